"""Attack rows of a model and put them back, or save the attacked model.

Imports only from models, and from what these may import.
"""
