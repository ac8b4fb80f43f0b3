"""Sweep attacks over rows and layers, beside controls, and say what they show.

Imports only from evaluation, and from what these may import.
"""
