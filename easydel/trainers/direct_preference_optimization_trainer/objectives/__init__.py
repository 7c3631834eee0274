"""Preference objectives: scores of a pair to its loss."""
