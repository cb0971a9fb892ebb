"""Sampling: generate images with a student."""
