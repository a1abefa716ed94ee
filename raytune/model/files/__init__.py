"""A model as files: looked at, checked, and written whole or not at all."""
