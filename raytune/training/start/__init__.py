"""From a plan to a model in an engine with rows, on this rank."""
