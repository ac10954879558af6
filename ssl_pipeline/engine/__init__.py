"""The one loop, the optimizer, checkpoints and processes."""
