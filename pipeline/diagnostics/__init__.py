"""Statistics of cached features that need no head: how well a layer suits the classes, whether two sets are alike."""
