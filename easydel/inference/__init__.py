"""Generate token ids with a model, by the forward pass that trains it."""
