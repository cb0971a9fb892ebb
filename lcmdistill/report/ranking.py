"""Which settings of several runs differ, and which run is the best by a chosen metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten
from lcmdistill.evaluation.results import Results
from lcmdistill.evaluation.verdict import Verdict
from lcmdistill.teachers.naming import public_path, redact_paths
from lcmdistill.utils.errors import UsageError

RANKED_BY = ("kid_teacher", "ssim")
"the metrics that rank by default: the first that all runs have"

RANKED_AT = 4
"the number of steps that ranks by default, if it was evaluated"

NOT_COMPARED = ("run.output", "run.device", "data.cache_dir", "run.push_to_hub", "run.report_to")
"settings that do not change a student"


@dataclass(frozen=True)
class Ranking:
    """Runs in the order of a metric at a number of steps.

    Attributes:
        metric: The metric's key.
        label: The metric's label.
        steps: The number of sampling steps.
        order: The indices of the runs, the best first; runs without a number come last.
        values: The number of each run.
    """

    metric: str
    label: str
    steps: int
    order: tuple[int, ...]
    values: tuple[float | None, ...]

    @property
    def text(self) -> str:
        """What ranks, in words."""
        return f"{self.label} at {self.steps} step{'s' * (self.steps > 1)}"


def rank(results: Sequence[Results], verdicts: Sequence[Verdict], rank_by: str | None = None) -> Ranking:
    """Rank evaluated runs. Runs of which no number of steps is usable come after the others.

    Args:
        results: The results of each run.
        verdicts: The verdict on each run.
        rank_by: METRIC or METRIC@STEPS; None is the default.

    Raises:
        UsageError: Not all runs have that metric or that number of steps.
    """
    shared = [name for name in results[0].metrics if all(name in each.metrics for each in results)]
    counts = [n for n in results[0].steps if all(n in each.steps for each in results)]
    metric, _, at = (rank_by or next(name for name in RANKED_BY if name in shared)).partition("@")
    if metric not in shared:
        raise UsageError(f"--rank-by {metric}: the runs have the metrics {', '.join(shared)}; choose one of them")
    if not counts:
        raise UsageError("the runs were evaluated at different steps; evaluate them together")
    if at and not (at.isdecimal() and int(at) in counts):
        raise UsageError(f"--rank-by {rank_by}: the runs were evaluated at {', '.join(map(str, counts))} steps")
    steps = int(at) if at else min(counts, key=lambda n: (abs(n - RANKED_AT), n))
    values = tuple(each.number(metric, "student", steps) for each in results)
    better = results[0].metrics[metric]["better"]

    def place(i: int) -> tuple[bool, bool, float]:
        value = values[i]
        if value is None:
            return True, True, 0.0
        cost = -value if better == "higher" else abs(value - 1) if better == "one" else value
        return False, not verdicts[i].usable, cost

    order = tuple(sorted(range(len(results)), key=place))
    return Ranking(metric, results[0].metrics[metric]["label"], steps, order, values)


def differing_settings(configs: Sequence[RunConfig]) -> list[tuple[str, list[str]]]:
    """Return (setting, its value in each run) of the settings that differ, the objective first.

    A setting that another objective does not have is listed where the runs that have it differ.
    """
    flat = [redact_paths(flatten(config)) for config in configs]
    names = [key for config in flat for key in config]
    names = [key for key in dict.fromkeys(["objective.name", *names]) if key not in NOT_COMPARED]
    rows = []
    for key in names:
        values = [config.get(key) for config in flat]
        is_shared = all(key in config for config in flat) or not key.startswith("objective.")
        compared = values if is_shared else [value for value in values if value is not None]
        if len({repr(value) for value in compared}) > 1:
            rows.append((key, ["–" if value is None else _text(value) for value in values]))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def short_settings(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Return the names of settings for the heads of columns: without their sections, unless two would be equal."""
    last = ["objective" if key == "objective.name" else key.rpartition(".")[2] for key, _ in rows]
    return [name if last.count(name) == 1 else key for name, (key, _) in zip(last, rows, strict=True)]


def use_commands(run: Path, judged: Verdict, results: Results) -> str:
    """Return the commands that generate images with a run, and export it."""
    folder, steps = quote(public_path(run)), judged.enough or results.steps[-1]
    return (
        f'lcmdistill sample {folder} --steps {steps} --prompt "a prompt"\n'
        f"lcmdistill export {folder} --format FORMAT --output FILE"
    )


def metric_columns(results: Sequence[Results], steps: int) -> Mapping[str, list[float | None]]:
    """Return the numbers of every metric that all runs have, at a number of steps: {metric: one number per run}."""
    shared = [name for name in results[0].metrics if all(name in each.metrics for each in results)]
    return {name: [each.number(name, "student", steps) for each in results] for name in shared}
