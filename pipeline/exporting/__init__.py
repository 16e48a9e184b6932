"""What an exported model is made of: the graph of a classifier, and the file it becomes."""
