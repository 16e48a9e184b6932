"""Shallow models on cached features: which exist, how their parameters are chosen, how they are kept."""
