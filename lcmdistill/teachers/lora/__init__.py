"""LoRA files of other programs: read, checked against a model, loaded as adapters or merged."""
