"""Files that are read and written: text, JSON documents, figures, whole or not at all.

Imports only from errors and interrupts, and from what these may import.
"""
