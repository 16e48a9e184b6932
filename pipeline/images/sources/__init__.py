"""Where images come from: folders, files, manifests, shards, digits."""
