"""Reading and writing files: text, JSON documents, plots, and atomic writes.

Imports only from errors and interrupts, and from what these may import.
"""
