"""Follow the massive weights over the checkpoints of a training run."""
