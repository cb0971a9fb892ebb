"""The charts of a run: what was measured step by step, and how the training went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.metrics.measures import FREE
from lcmdistill.evaluation.results import Results
from lcmdistill.report.charts import Chart, Series

RAW = 9
"the look of a line of single values behind its average"

_RATIOS = ("sharpness", "saturation", "diversity")

_GOOD = {"lower": "Lower is better.", "higher": "Higher is better.", "one": "1 is the teacher's own."}


def good(better: str) -> str:
    """What is good of a number, in words."""
    return _GOOD[better]


def quality_charts(results: Results) -> list[Chart]:
    """A chart of each measure against steps: the student, the teacher at as few, and its line at full steps."""
    found = []
    for name, about in results.about["measures"].items():
        series = [
            _against_steps(results, name, "student", "student", 0),
            _against_steps(results, name, "teacher", "teacher, as few steps", 1),
            _against_steps(results, name, "trailing", "teacher, from full noise", 2),
        ]
        full = results.full(name)
        levels = (
            ((f"teacher, {TEACHER_STEPS} steps", full),) if full is not None and name not in ("rmse", "ssim") else ()
        )
        chart = Chart(
            about["label"],
            "steps",
            about["label"],
            tuple(s for s in series if s.points),
            levels,
            f"{about['about']} {good(about['better'])}",
            doubling=True,
            from_zero=name not in _RATIOS,
        )
        if not chart.is_empty:
            found.append(chart)
    return found


def consistency_charts(results: Results) -> list[Chart]:
    """How far the student's clean images lie from each other between neighbouring times of a trajectory; none or one."""
    student = Series("student", _finite([(x, y) for x, y, _ in results.consistency]))
    teacher = Series("teacher's x0", _finite([(x, y) for x, _, y in results.consistency]), 1)
    chart = Chart(
        "Consistency error",
        "from clean (0) to all noise (1)",
        "RMS |f(z_t, t) - f(z_s, s)|",
        (student, teacher),
        about="Between neighbouring times of the teacher's own trajectories; a perfect consistency model is at 0.",
        from_zero=True,
        markers=False,
    )
    return [] if chart.is_empty else [chart]


def _against_steps(results: Results, measure: str, sampler: Any, name: str, look: int) -> Series:
    values = [(float(n), results.number(measure, sampler, n)) for n in results.steps]
    return Series(name, tuple((n, v) for n, v in values if v is not None), look)


def training_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Loss, learning rate, gradient norm and speed; the loss by noise; and what validation measured."""
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return []
    found = [
        _over_time(trained, "loss", "Loss", ""),
        _over_time(trained, "grad_norm", "Gradient norm", "Before clipping."),
        Chart(
            "Learning rate",
            "training step",
            "learning rate",
            (_series(trained, "learning_rate"),),
            from_zero=True,
            markers=False,
        ),
        _over_time(trained, "samples_per_s", "Speed, samples a second", "Of all processes together."),
    ]
    found += [loss_by_noise(trained), *validation_charts(lines)]
    return [chart for chart in found if not chart.is_empty]


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    return Series(key, _finite([(line["step"], line[key]) for line in lines if key in line]))


def _finite(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points without those that no chart can show: under fp16 an infinite gradient norm is nothing out of the ordinary."""
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(y))


def _over_time(lines: Sequence[Mapping[str, Any]], key: str, title: str, about: str) -> Chart:
    raw = _series(lines, key).points
    reach = max(1, len(raw) // 12)
    if reach == 1:  # too few to be averaged
        return Chart(
            title, "training step", title.lower(), (Series(key, raw),), about=about, from_zero=True, markers=False
        )
    about = f"{about} Behind the average of the last lines, the lines themselves.".strip()
    means = []
    for i, (x, _) in enumerate(raw):
        window = [y for _, y in raw[max(0, i - reach + 1) : i + 1]]
        means.append((x, sum(window) / len(window)))
    series = (Series("average", tuple(means)), Series("each line", raw, RAW))
    return Chart(title, "training step", title.lower(), series, about=about, from_zero=True, markers=False)


def loss_by_noise(lines: Sequence[Mapping[str, Any]]) -> Chart:
    """The loss against how noisy its samples were, early, midway and late in the training."""
    told = [line["loss_by_noise"] for line in lines if line.get("loss_by_noise")]
    thirds = (
        [told[i * len(told) // 3 : (i + 1) * len(told) // 3] for i in range(3)] if len(told) >= 3 else [[], [], told]
    )
    series = []
    for name, look, part in zip(("first third", "second third", "last third"), (2, 1, 0), thirds, strict=True):
        points = []
        for i in range(len(part[0]) if part else 0):
            values = [line[i] for line in part if line[i] is not None and math.isfinite(line[i])]
            if values:
                points.append(((i + 0.5) / len(part[0]), sum(values) / len(values)))
        series.append(Series(name, tuple(points), look))
    return Chart(
        "Loss by noise",
        "from clean (0) to all noise (1)",
        "loss",
        tuple(s for s in reversed(series) if s.points),
        about="Where along the way the student still disagrees with itself, by thirds of the training.",
        from_zero=True,
    )


def validation_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """StopSignal with the teacher on the validation prompts as the training went on, a line for each number of steps."""
    found = []
    for name in ("rmse", "ssim"):
        keys = sorted({key for line in lines for key in line if key.startswith(f"val/{name}_")}, key=_steps_of)
        series = [
            Series(
                f"{_steps_of(key)} step{'s' * (_steps_of(key) > 1)}",
                _series(lines, key).points,
                look,
            )
            for key, look in zip(keys, (3, 4, 0, 5, 1, 2), strict=False)
        ]
        title = f"{FREE[name].label} in validation"
        about = f"To the teacher's full steps, on the validation prompts. {good(FREE[name].better)}"
        found.append(Chart(title, "training step", FREE[name].label, tuple(series), about=about))
    return found


def _steps_of(key: str) -> int:
    return int(key.rpartition("_")[2])
