"""Who hears of a run: its folder, metrics.jsonl, W&B, the terminal."""
