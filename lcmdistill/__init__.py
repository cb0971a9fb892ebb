"""Distil a Stable Diffusion teacher into a student that draws in 1 to 8 steps."""

__version__ = "0.1.0"
