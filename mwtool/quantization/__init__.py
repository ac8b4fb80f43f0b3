"""Measure what quantizing a model costs, and how much of it protecting a few weights gives back.

Imports only from evaluation, and from what it may import.
"""
