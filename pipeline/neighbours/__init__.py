"""The parts of `similar`, `duplicates` and `suspects`: which images look alike, and how far that can be trusted."""
