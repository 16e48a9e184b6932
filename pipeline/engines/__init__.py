"""What runs a tapped network over batches of images: device, precision, and the loop."""
