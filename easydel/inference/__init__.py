"""Text from a model, by the forward pass that trains it."""
