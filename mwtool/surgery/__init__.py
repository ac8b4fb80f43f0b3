"""Attack rows of a model's FFN and restore them, or save the attacked model.

Imports only from models, and from what these may import.
"""
