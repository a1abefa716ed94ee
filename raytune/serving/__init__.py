"""Models at work: an engine that answers many requests at once, and an endpoint over it."""
