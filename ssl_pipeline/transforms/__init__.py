"""The random views of an image, batched, every draw by name."""
