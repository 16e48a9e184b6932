"""Frozen CNN features, shallow heads: the stages of thawline, a module each.

Nothing is exported here on purpose: write ``from pipeline.extract import extract``.
"""
