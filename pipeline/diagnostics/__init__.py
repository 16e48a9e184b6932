"""What cached features say before any head is trained: which layer suits the classes, and whether two sets are alike."""
