"""Single-file checkpoints: what they are, and how they are loaded."""
