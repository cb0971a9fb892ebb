"""Data: sources, latents on disk, and micro-batches."""
