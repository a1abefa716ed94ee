"""A row as it is understood, whatever its format: turns, what of them is trained, and how much it weighs."""
