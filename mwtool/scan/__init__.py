"""Find the massive weights: run the first token, capture each layer's states, apply the definitions.

Imports only from models, and from what these may import.
"""
