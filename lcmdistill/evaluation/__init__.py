"""Evaluation: sweeps over steps and guidance, metrics, and the verdict."""
