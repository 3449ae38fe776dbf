"""The run directory: layout, checkpoints, resuming."""
