"""Keep a run on disk: its folder, log, checkpoints and identity."""
