"""Attend over rows of trees: the rule of what sees what, and one backend per platform."""
