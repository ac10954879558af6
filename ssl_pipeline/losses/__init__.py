"""InfoNCE, its temperature, and the batch across processes."""
