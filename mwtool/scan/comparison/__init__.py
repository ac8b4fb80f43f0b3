"""Compare the scans of two models, such as a base model and its fine-tuned version: rows, events, dimensions."""
