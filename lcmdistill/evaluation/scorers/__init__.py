"""Scorers: published models that rate an image, mostly by its prompt."""
