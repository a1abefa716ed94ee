"""What is said of a config: documents made of its fields, hints for misspelt and foreign names, pages of errors."""
