"""What a plan knows of rows, and what it decides about them: mixtures, splits, streams, limits."""
