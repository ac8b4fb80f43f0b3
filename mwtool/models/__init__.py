"""Models: located, read from their checkpoints, streamed a layer at a time, loaded whole, written anew.

Imports only from architecture, and from what these may import.
"""
