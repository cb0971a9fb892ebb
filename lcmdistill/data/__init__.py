"""Data: where samples come from, and how they become latents and embeddings on disk."""

from lcmdistill.data.sources import SOURCES

__all__ = ["SOURCES"]
