"""Comparisons over initialisations, regimes and seeds."""
