"""Direct preference optimisation: configuration, objectives, scoring, loss, reference, trainer."""
