"""Images and labels: sources, decoding, splits, order and loading."""
