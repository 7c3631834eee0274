"""Compute on arrays: pure functions, one file each, that know nothing of models or preferences."""
