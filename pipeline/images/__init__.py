"""Images: sources list and read them, decode and resize make them the network's input, the loader runs it all ahead."""
