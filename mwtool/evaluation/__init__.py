"""Measure a model: perplexity, zero-shot tasks, generation, and paired comparisons of two results.

Imports only from scan and surgery, and from what these may import.
"""
