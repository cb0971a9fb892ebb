"""Students: the networks that are trained, full or LoRA."""
