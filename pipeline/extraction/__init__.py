"""Stage 1 in parts: what the cache holds, files made and filled, a cache looked into."""
