"""What adapters describe: where a feed-forward network's matrices are, and whether that fits the model.

Imports only from files and massive, and from what these may import.
"""
