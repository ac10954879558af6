"""Comparisons over initializations, regimes and seeds."""
