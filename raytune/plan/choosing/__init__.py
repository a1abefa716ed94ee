"""Choices that a config leaves open, made in the order in which they need each other: `setting` before data, `choose` after."""
