"""Models as files that others load, and the places that they are pushed to."""
