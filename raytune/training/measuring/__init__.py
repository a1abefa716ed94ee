"""What is measured of a run beside its loss, and what it leaves behind."""
