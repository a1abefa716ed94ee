"""A run as its folder tells it: begun, going on, finished; what it came to, and who is told."""
