"""Figures: neighbors, probe, collapse, intervals."""
