"""What a person reads afterwards: figures, and pages that need nothing but a browser."""
