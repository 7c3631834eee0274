"""Attention over trees, with one backend a platform."""
