"""What changes how a method learns, each with its meaning, its refusals and its words."""
