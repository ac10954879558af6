"""Backbone, neck, bottleneck, head, and the artifact that carries them."""
