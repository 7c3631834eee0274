"""Callbacks of a run: progress, trackers, early stopping."""
