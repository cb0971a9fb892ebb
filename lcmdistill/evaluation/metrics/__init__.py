"""Metrics: what is measured of images and latents."""
