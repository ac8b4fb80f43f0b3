"""Models: locating, reading checkpoints, streaming layer by layer, loading whole, and saving.

Imports only from architecture, and from what these may import.
"""
