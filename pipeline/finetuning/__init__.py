"""Training the top of a network above its thaw line: network, data, groups of rates, loop, checkpoints, model file."""
