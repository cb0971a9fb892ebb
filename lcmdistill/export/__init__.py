"""What a run writes for other programs."""
