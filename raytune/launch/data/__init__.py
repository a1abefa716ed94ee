"""Data and base made ready on the driver's side, and what a person sees of it."""
