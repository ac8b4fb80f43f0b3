"""Pebble: a language model that transformers does not know, and the mwtool adapter for it."""
