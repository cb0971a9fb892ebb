"""The loss of our own runs of the bundled teacher, shown behind the loss of a run with the same settings.

A loss depends on the teacher, the data and most settings, so the curves are shown for no other run.
"""

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import RunConfig, StudentConfig
from lcmdistill.config.toml import flatten
from lcmdistill.utils.json_text import parse_json

FILE = "loss-curves.json"

SECTIONS = ("objective.", "optim.", "student.")
"what a loss depends on, with the teacher and the data"

KEYS = ("teacher.model", "data.sources", "data.resolution", "data.crop", "data.flip", "data.caption_drop")

NOT_COMPARED = ("optim.max_train_steps", "student.offload_target")
"settings with the same loss at the same step"


def relevant_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a run's loss depends on, as JSON has them."""
    flat = flatten(config)
    chosen = {k: v for k, v in flat.items() if (k.startswith(SECTIONS) or k in KEYS) and k not in NOT_COMPARED}
    if config.optim.lr_scheduler != "constant":
        chosen["optim.max_train_steps"] = flat["optim.max_train_steps"]
    return parse_json(json.dumps(chosen))


@cache
def _recorded() -> list[dict[str, Any]]:
    path = Path(str(files("lcmdistill") / "assets" / FILE))
    return parse_json(path.read_text(encoding="utf-8"))["curves"]


def expected_loss(config: RunConfig) -> tuple[tuple[float, float], ...]:
    """Return (step, loss) of our own run with the same settings; () if there is none."""
    settings = relevant_settings(config)
    # A setting that is newer than a recording changes nothing by default.
    unset = relevant_settings(replace(config, objective=type(config.objective)(), student=StudentConfig()))
    for curve in _recorded():
        if {**unset, **curve["settings"]} == settings:
            return tuple((float(step), float(loss)) for step, loss in curve["loss"])
    return ()
