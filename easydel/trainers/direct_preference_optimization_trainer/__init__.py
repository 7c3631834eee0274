"""Direct preference optimisation: configuration, objectives, reference, steps, trainer."""
