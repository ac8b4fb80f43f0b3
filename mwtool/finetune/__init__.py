"""Fine-tune with LoRA or DoRA and MacDrop, from data to a saved PEFT adapter.

Imports only from macdrop and scan, and from what these may import.
"""
