"""What leaves the house: predictions and models."""
