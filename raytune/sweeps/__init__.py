"""Sweeps: many short trials of one run, of which only the promising ones are trained to the end."""
