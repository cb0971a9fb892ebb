"""Training: set up, train, validate, save and resume one run."""
