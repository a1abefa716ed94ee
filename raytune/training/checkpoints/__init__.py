"""How a checkpoint comes to count, is found again and goes."""
