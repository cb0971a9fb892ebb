"""Configurations and runs as the command line makes them, from flat settings."""

from functools import partial

from lcmdistill import run as distill
from lcmdistill.config.resolve import preset_changes as _preset_changes
from lcmdistill.config.resolve import resolve as _resolve
from lcmdistill.objectives import OBJECTIVES

__all__ = ["distill", "preset_changes", "resolve"]

resolve = partial(_resolve, objectives=OBJECTIVES)
preset_changes = partial(_preset_changes, objectives=OBJECTIVES)
