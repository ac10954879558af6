"""Across domains: what is learned in one is used in another."""
