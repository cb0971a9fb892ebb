"""What an evaluation left in a run's folder, written and read again without any network."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import RunConfig
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.metrics.measures import Measure
from lcmdistill.evaluation.sweep import Sampler, Sweep, SweepPoint, picture_places
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError

TOLD = ("label", "better", "about", "features", "against", "published", "decimals")
"what is written down of each measure, so that every number says what it is"


@dataclass(frozen=True)
class Results:
    """A sweep that is done. about: sweep.json; cells: numbers.json of each cell, by its name."""

    folder: Path
    about: Mapping[str, Any]
    cells: Mapping[str, Mapping[str, Any]]
    consistency: tuple[tuple[float, float, float], ...] = ()
    "noisiness, the student's error, the teacher's"

    def is_of(self, config: RunConfig) -> bool:
        """Whether the run was trained as long then as it is now by its config."""
        now = config.optim.max_train_steps
        return self.about.get("trained_steps", now) == now

    @property
    def steps(self) -> list[int]:
        """The student's steps, rising."""
        return sorted(self.about["steps"])

    @property
    def guidance_scale(self) -> float:
        """The one that the teacher's few steps are drawn at."""
        return float(self.about["guidance_scales"][0])

    def cell(self, sampler: Sampler, steps: int, guidance_scale: float | None = None) -> Mapping[str, Any] | None:
        """A cell, at the first guidance scale unless another is named; None if it was not drawn."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self.cells.get(SweepPoint(sampler, steps, scale).name)

    def number(self, measure: str, sampler: Sampler, steps: int, guidance_scale: float | None = None) -> float | None:
        """One number of a cell; None if there is none, or a student that draws no numbers has none to show."""
        cell = self.cell(sampler, steps, guidance_scale)
        value = None if cell is None else cell["numbers"].get(measure)
        return value if value is not None and math.isfinite(value) else None

    def full(self, measure: str) -> float | None:
        """The teacher's number at its full steps."""
        return self.number(measure, "teacher", TEACHER_STEPS)

    def seconds(self, sampler: Sampler, steps: int) -> float | None:
        """How long an image took."""
        cell = self.cell(sampler, steps)
        return None if cell is None else cell["seconds_an_image"]

    def how(self, sampler: Sampler, steps: int) -> str:
        """What that time was taken with: "batches of 16 on cpu, 2 threads"."""
        told = (self.cell(sampler, steps) or {}).get("how")
        # An earlier version told it of a sweep as a whole.
        return told or f"batches of {self.about.get('batch_size')} on {self.about.get('device')}"

    def pictures(self, sampler: Sampler, steps: int, guidance_scale: float) -> list[Path]:
        """The pictures that were kept of a cell."""
        return sorted((self.folder / "cells" / SweepPoint(sampler, steps, guidance_scale).name).glob("*.webp"))


def write_sweep(folder: Path, sweep: Sweep, measures: Mapping[str, Measure], more: Mapping[str, Any]) -> None:
    """Write sweep.json once all its cells are there. more: plain values to be kept beside it."""
    prompts = [sweep.prompts[place] for place in picture_places(len(sweep.prompts))]
    about = {
        "cells": [cell.name for cell in sweep.cells()],
        "steps": sweep.steps,
        "guidance_scales": sweep.guidance_scales,
        "images": len(sweep.prompts),
        "distinct_prompts": len(set(sweep.prompts)),
        "resolution": sweep.resolution,
        "seed": sweep.seed,
        "pictured_prompts": prompts,
        "measures": {name: {key: getattr(measure, key) for key in TOLD} for name, measure in measures.items()},
        **more,
    }
    write_text(folder / "sweep.json", json.dumps(about, indent=1) + "\n")


def read_results(run: Path) -> Results | None:
    """What an evaluation found of a run; None if there was none. Raises UsageError if its files cannot be read."""
    folder = run / "evaluation"
    if not (folder / "sweep.json").is_file():
        return None
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"what an evaluation left in {folder} cannot be read ({error}); make it anew: lcmdistill evaluate {run}"
        ) from error


def _read(folder: Path) -> Results:
    about = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    # What earlier versions did not write down: theirs were all of prompts, and a LoRA alone had its guidance in its weights.
    about = {"is_baked": about.get("is_lora", False), "held_out": True, **about}
    cells = {}
    for name in about["cells"]:
        path = folder / "cells" / name / "numbers.json"
        if path.is_file():
            cells[name] = json.loads(path.read_text(encoding="utf-8"))
    path = folder / "consistency.json"
    points = json.loads(path.read_text(encoding="utf-8"))["points"] if path.is_file() else []
    return Results(folder, about, cells, tuple(map(tuple, points)))
