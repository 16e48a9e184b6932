"""Which rows train and which test, how good predictions are, and how certain that is."""
