"""The results of an evaluation in a run folder, written and read without any network."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import RunConfig
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.metrics.base import Metric
from lcmdistill.evaluation.previews import damaged_previews, preview_indices, preview_name
from lcmdistill.evaluation.sweep import Sampler, Sweep, SweepPoint
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.checksums import checked_json, read_checked_json
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)

RECORDED = ("label", "better", "description", "measured_on", "compared_with", "published", "decimals", "limits")
"the fields of a metric that sweep.json records"


@dataclass(frozen=True)
class Results:
    """A finished sweep.

    Attributes:
        folder: RUN/evaluation.
        info: The content of sweep.json.
        points: The content of each point's numbers.json, by the point's name.
        consistency: (noise level, student's error, teacher's error).
        damaged: The previews that cannot be shown.
    """

    folder: Path
    info: Mapping[str, Any]
    points: Mapping[str, Mapping[str, Any]]
    consistency: tuple[tuple[float, float, float], ...] = ()
    damaged: frozenset[Path] = frozenset()

    def is_current(self, config: RunConfig) -> bool:
        """Return whether the run still has the number of training steps that was evaluated."""
        steps = config.optim.max_train_steps
        return self.info.get("trained_steps", steps) == steps

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """The metrics' descriptions by name."""
        return self.info["metrics"]

    @property
    def protocol(self) -> str:
        """The published protocol and the deviations from it, in one sentence; "" without a protocol."""
        recorded = self.info.get("protocol")
        if not recorded:
            return ""
        differences = "; ".join(recorded["deviations"])
        return f"Protocol {recorded['name']}: {recorded['source']}. Deviations: {differences}."

    @property
    def steps(self) -> list[int]:
        """The student's step counts in ascending order."""
        return sorted(self.info["steps"])

    @property
    def guidance_scale(self) -> float:
        """The first guidance scale, which the verdict uses."""
        return float(self.info["guidance_scales"][0])

    def point(self, sampler: Sampler, steps: int, guidance_scale: float | None = None) -> Mapping[str, Any] | None:
        """Return a point's results, by default at the first guidance scale; None if the sweep does not have it."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self.points.get(SweepPoint(sampler, steps, scale).name)

    def number(self, metric: str, sampler: Sampler, steps: int, guidance_scale: float | None = None) -> float | None:
        """Return one number; None if it does not exist or is not finite."""
        point = self.point(sampler, steps, guidance_scale)
        value = None if point is None else point["numbers"].get(metric)
        return value if value is not None and math.isfinite(value) else None

    def error(self, metric: str, sampler: Sampler, steps: int) -> float | None:
        """Return the standard error of a number; None if it has none."""
        value = (self.point(sampler, steps) or {}).get("standard_errors", {}).get(metric)
        return value if value is not None and math.isfinite(value) else None

    def full(self, metric: str) -> float | None:
        """Return the teacher's number at its full steps."""
        return self.number(metric, "teacher", TEACHER_STEPS)

    def seconds(self, sampler: Sampler, steps: int) -> float | None:
        """Return the time per image."""
        point = self.point(sampler, steps)
        return None if point is None else point["seconds_per_image"]

    def conditions(self, sampler: Sampler, steps: int) -> str:
        """Return the conditions of that time, such as "batches of 16 on cpu, 2 threads"."""
        recorded = (self.point(sampler, steps) or {}).get("conditions")
        # Earlier versions recorded it once per sweep.
        return recorded or f"batches of {self.info.get('batch_size')} on {self.info.get('device')}"

    def previews(self, sampler: Sampler, steps: int, guidance_scale: float) -> list[Path | None]:
        """Return a point's preview images in the order of the previewed prompts, None for a damaged one; [] for no point."""
        name = SweepPoint(sampler, steps, guidance_scale).name
        count = len(self.info["preview_prompts"]) if name in self.points else 0
        paths = [self.folder / "points" / name / preview_name(i) for i in range(count)]
        return [None if path in self.damaged else path for path in paths]


def write_sweep(folder: Path, sweep: Sweep, metrics: Mapping[str, Metric], more: Mapping[str, Any]) -> None:
    """Write sweep.json after all points are finished.

    Args:
        folder: RUN/evaluation.
        sweep: What was generated.
        metrics: The metrics that were computed.
        more: Further plain values to record.
    """
    info = {
        "points": [point.name for point in sweep.points()],
        "steps": sweep.steps,
        "guidance_scales": sweep.guidance_scales,
        "images": len(sweep.prompts),
        "distinct_prompts": len(set(sweep.prompts)),
        "resolution": sweep.resolution,
        "sizes": [f"{height}x{width}" for height, width in dict.fromkeys(sweep.sizes)],
        "seed": sweep.seed,
        "preview_prompts": [sweep.prompts[i] for i in preview_indices(len(sweep.prompts))],
        "metrics": {name: {key: getattr(metric, key) for key in RECORDED} for name, metric in metrics.items()},
        **more,
    }
    write_text(folder / "sweep.json", checked_json(info))


def read_results(run: Path) -> Results | None:
    """Read a run's evaluation. Return None if there is none, or one by an earlier version, which is reported.

    Raises:
        UsageError: The files cannot be read.
    """
    folder = run / "evaluation"
    if not (folder / "sweep.json").is_file():
        if (folder / "points").is_dir():
            logger.warning(f"{folder} has no sweep.json, and is left out: it is incomplete; {_evaluate_again(folder)}")
        return None
    try:
        info = read_checked_json(folder / "sweep.json")
        if "points" not in info:
            logger.warning(
                f"the evaluation in {folder} is by an earlier version; evaluate again: lcmdistill evaluate {run}"
            )
            return None
        return _read(folder, info)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the evaluation in {folder} cannot be read ({error}); evaluate again: lcmdistill evaluate {run}"
        ) from error


def _read(folder: Path, info: Mapping[str, Any]) -> Results:
    points, damaged = {}, set()
    for name in info["points"]:
        path = folder / "points" / name / "numbers.json"
        if not path.is_file():
            logger.warning(f"{path} is missing, and its numbers are left out; {_evaluate_again(folder)}")
            continue
        points[name] = read_checked_json(path)
        _check_point(path, points[name])
        for preview, state in damaged_previews(path.parent).items():
            logger.warning(f"{path.parent / preview} is {state}, and is left out; {_evaluate_again(folder)}")
            damaged.add(path.parent / preview)
    path = folder / "consistency.json"
    if not path.is_file():
        logger.warning(f"{path} is missing, and its curve is left out; {_evaluate_again(folder)}")
    curve = read_checked_json(path)["points"] if path.is_file() else []
    return Results(folder, info, points, tuple(map(tuple, curve)), frozenset(damaged))


def _evaluate_again(folder: Path) -> str:
    return f"evaluate again: lcmdistill evaluate {folder.parent}"


def _check_point(path: Path, point: Mapping[str, Any]) -> None:
    """Raise ValueError if a point's results have other types than they are written with."""
    numbers, seconds, errors = point["numbers"], point["seconds_per_image"], point.get("standard_errors", {})
    values = [*numbers.values(), *errors.values(), seconds] if isinstance(numbers, dict) else []
    are_numbers = all(value is None or isinstance(value, int | float) for value in values)
    if not isinstance(numbers, dict) or not are_numbers or not isinstance(point.get("conditions", ""), str):
        raise ValueError(f"{path} holds values of another type")
