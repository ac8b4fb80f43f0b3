"""Architecture adapters: where a model keeps the matrices of its FFNs, and whether a description fits the model.

Imports only from files and massive, and from what these may import.
"""
