"""From rows of a store or a stream to tensors of a step, on each rank."""
