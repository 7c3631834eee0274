"""What hears of a run: progress, trackers, early stopping."""
