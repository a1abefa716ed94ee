"""What is wrong with rows among each other: doubles, leaks, contradictions, imbalance."""
