"""The learning-rate range test, from the driver's side."""
