"""Pretrained networks by name, and the taps that turn one into a feature extractor."""
