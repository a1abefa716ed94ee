"""Optimizers and learning rates: what they need, and what is advised."""
