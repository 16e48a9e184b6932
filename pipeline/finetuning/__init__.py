"""Fine-tuning: recipe, data, network, training loop with checkpoints and gradient watch, and the saved file."""
