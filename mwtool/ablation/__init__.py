"""Ablation: sweep attacks over rows and layers, compare them with controls, and check what a model leans on.

Imports only from evaluation, and from what these may import.
"""
