"""Figures: neighbours, probe, collapse, intervals."""
