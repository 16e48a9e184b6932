"""Images: sources list them, decoding gives upright RGB, one resize gives the network's pixels, a loader feeds both."""
