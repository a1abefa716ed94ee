"""A whole model as one GGUF file."""
