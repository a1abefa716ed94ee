"""Rows that are tokenised while training goes on, of inputs larger than memory and disk."""
