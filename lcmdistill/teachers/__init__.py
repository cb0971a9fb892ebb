"""Teachers: the models that are distilled, and what the package knows about their families."""
