"""Downstream tasks, one file each, and the regimes that train them."""
