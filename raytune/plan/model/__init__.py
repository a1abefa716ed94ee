"""What a plan knows of a base without loading it: its shape, and which of its weights a method trains."""
