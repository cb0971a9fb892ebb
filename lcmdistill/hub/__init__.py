"""The Hugging Face hub: model cards, documents of a run, and uploads."""
