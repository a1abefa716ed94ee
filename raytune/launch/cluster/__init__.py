"""Reaching a Ray cluster, or starting one inside this machine, and leaving it as it was."""
