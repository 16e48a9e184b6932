"""What cached features tell before a head is trained: which layer suits the classes, whether two sets are alike."""
