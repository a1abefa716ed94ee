"""What is minimised, and how a model computes it in chunks over its head."""
