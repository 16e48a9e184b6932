"""Where images come from: folders, files, manifests, packed files, digits; here or behind a URL."""
