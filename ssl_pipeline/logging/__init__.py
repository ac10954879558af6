"""Run folder and loggers: metrics.jsonl, W&B and others, the terminal."""
