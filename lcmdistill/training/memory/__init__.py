"""The memory of a training step, and settings with which it fits."""
