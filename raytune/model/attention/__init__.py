"""Attention in packed rows, and in rows that are divided among ranks."""
