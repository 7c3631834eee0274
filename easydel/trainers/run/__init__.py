"""What a run keeps on disk: its folder, checkpoints, record and identity."""
