"""What a plan is told, gathered by others: the machines that there are, and the stores that were built."""
