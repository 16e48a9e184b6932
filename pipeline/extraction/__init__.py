"""Extraction in parts: look up what the cache holds, open files for the rest, fill them; and inspect a cache."""
