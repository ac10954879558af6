"""Metrics: pure functions of features, predictions and labels."""
