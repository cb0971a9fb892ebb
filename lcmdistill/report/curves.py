"""The charts of a run: metrics against sampling steps, and the course of the training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.metrics.basic import BASIC_METRICS
from lcmdistill.evaluation.results import Results
from lcmdistill.evaluation.sweep import Sampler
from lcmdistill.report.charts import RAW, Chart, Series

_RATIOS = ("sharpness", "saturation", "diversity")

_GOOD = {"lower": "Lower is better.", "higher": "Higher is better.", "one": "1 is the teacher's value."}


def good(better: str) -> str:
    """Return which values of a metric are good, in words."""
    return _GOOD[better]


def quality_charts(results: Results) -> list[Chart]:
    """Return one chart per metric against steps: the student, the teacher at the same steps and at its full steps."""
    charts = []
    for name, metric in results.metrics.items():
        series = [
            against_steps(results, name, "student", "student", 0),
            against_steps(results, name, "teacher", "teacher, same steps", 1),
            against_steps(results, name, "trailing", "teacher, trailing timesteps", 2),
        ]
        chart = Chart(
            metric["label"],
            "steps",
            metric["label"],
            tuple(s for s in series if s.points),
            full_steps_level(results, name),
            f"{metric['description']} {good(metric['better'])}",
            log2_x=True,
            from_zero=name not in _RATIOS,
        )
        if not chart.is_empty:
            charts.append(chart)
    return charts


def full_steps_level(results: Results, metric: str) -> tuple[tuple[str, float], ...]:
    """Return the teacher's number at full steps as a level of a chart; none where it is 0 or 1 by definition."""
    full = results.full(metric)
    return ((f"teacher, {TEACHER_STEPS} steps", full),) if full is not None and metric not in ("rmse", "ssim") else ()


def consistency_charts(results: Results) -> list[Chart]:
    """Return the chart of the consistency error along trajectories; none or one."""
    student = Series("student", _finite([(x, y) for x, y, _ in results.consistency]))
    teacher = Series("teacher's x0", _finite([(x, y) for x, _, y in results.consistency]), 1)
    chart = Chart(
        "Consistency error",
        "noise level (0 = clean, 1 = pure noise)",
        "RMS |f(z_t, t) - f(z_s, s)|",
        (student, teacher),
        about="Between neighboring times on the teacher's trajectories. A perfect consistency model is at 0.",
        from_zero=True,
        markers=False,
    )
    return [] if chart.is_empty else [chart]


def against_steps(results: Results, metric: str, sampler: Sampler, name: str, style: int) -> Series:
    """Return a sampler's numbers of a metric against steps.

    Args:
        results: The results of a run.
        metric: The metric.
        sampler: What generated the images.
        name: The line's name in the legend.
        style: The line's style.
    """
    values = [(float(n), results.number(metric, sampler, n)) for n in results.steps]
    return Series(name, tuple((n, v) for n, v in values if v is not None), style)


def training_charts(lines: Sequence[Mapping[str, Any]], expected: Sequence[tuple[float, float]] = ()) -> list[Chart]:
    """Return the charts of loss, gradient norm, learning rate, speed, loss by noise level, and validation.

    Args:
        lines: The lines of metrics.jsonl.
        expected: (step, loss) of our own run with the same settings.
    """
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return []
    charts = [
        _with_expected(_over_time(trained, "loss", "Loss", ""), expected),
        _over_time(trained, "grad_norm", "Gradient norm", "Before clipping."),
        Chart(
            "Learning rate",
            "training step",
            "learning rate",
            (_series(trained, "learning_rate"),),
            from_zero=True,
            markers=False,
        ),
        _over_time(trained, "samples_per_s", "Speed, samples per second", "Sum over all processes."),
    ]
    shares = tuple(_series(trained, key) for key in ("teacher_gap", "dm_share", "ca_share"))
    about = "Distance to the guided teacher, and the two terms of the update as shares of it: matching and guidance."
    charts += [
        _over_time(trained, "critic_loss", "Critic loss", "Rises at first, then levels out."),
        _over_time(trained, "critic_grad_norm", "Gradient norm of the critic", "Before clipping."),
        Chart("Terms of the update", "training step", "mean absolute value", shares, about=about, markers=False),
    ]
    charts += [loss_by_noise(trained), *validation_charts(lines)]
    return [chart for chart in charts if not chart.is_empty]


def _with_expected(chart: Chart, expected: Sequence[tuple[float, float]]) -> Chart:
    """Add the loss of our own run, up to the last step of the chart's first series."""
    last = max((x for x, _ in chart.series[0].points), default=0.0)
    points = tuple((x, y) for x, y in expected if x <= last)
    if len(points) < 2:
        return chart
    about = (
        f"{chart.about} Dotted: a run of ours with the same settings; other seeds and machines differ a little.".strip()
    )
    return replace(chart, series=(*chart.series, Series("expected", points, 2)), about=about)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    return Series(key, _finite([(line["step"], line[key]) for line in lines if key in line]))


def _finite(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Drop points that no chart can show: with fp16, infinite gradient norms are normal."""
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(y))


def _over_time(lines: Sequence[Mapping[str, Any]], key: str, title: str, about: str) -> Chart:
    raw = _series(lines, key).points
    window = max(1, len(raw) // 12)
    if window == 1:  # too few for an average
        return Chart(
            title, "training step", title.lower(), (Series(key, raw),), about=about, from_zero=True, markers=False
        )
    about = f"{about} Bold: moving average; thin: raw values.".strip()
    means = []
    for i, (x, _) in enumerate(raw):
        values = [y for _, y in raw[max(0, i - window + 1) : i + 1]]
        means.append((x, sum(values) / len(values)))
    series = (Series("moving average", tuple(means)), Series("raw values", raw, RAW))
    return Chart(title, "training step", title.lower(), series, about=about, from_zero=True, markers=False)


def loss_by_noise(lines: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the loss against the noise level, for the first, middle and last third of the training."""
    logged = [line["loss_by_noise"] for line in lines if line.get("loss_by_noise")]
    thirds = (
        [logged[i * len(logged) // 3 : (i + 1) * len(logged) // 3] for i in range(3)]
        if len(logged) >= 3
        else [[], [], logged]
    )
    series = []
    for name, style, part in zip(("first third", "middle third", "last third"), (2, 1, 0), thirds, strict=True):
        points = []
        for i in range(len(part[0]) if part else 0):
            values = [line[i] for line in part if line[i] is not None and math.isfinite(line[i])]
            if values:
                points.append(((i + 0.5) / len(part[0]), sum(values) / len(values)))
        series.append(Series(name, tuple(points), style))
    return Chart(
        "Loss by noise level",
        "noise level (0 = clean, 1 = pure noise)",
        "loss",
        tuple(s for s in reversed(series) if s.points),
        about="Consistency loss by noise level, for the first, middle and last third of training.",
        from_zero=True,
    )


def validation_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the similarity to the teacher on the validation prompts over the training, one line per step count."""
    charts = []
    for name in ("rmse", "ssim"):
        keys = sorted({key for line in lines for key in line if key.startswith(f"val/{name}_")}, key=_steps_of)
        series = [
            Series(
                f"{_steps_of(key)} step{'s' * (_steps_of(key) > 1)}",
                _series(lines, key).points,
                style,
            )
            for key, style in zip(keys, (3, 4, 0, 5, 1, 2), strict=False)
        ]
        title = f"{BASIC_METRICS[name].label} in validation"
        about = f"Compared with the teacher's full steps on the validation prompts. {good(BASIC_METRICS[name].better)}"
        charts.append(Chart(title, "training step", BASIC_METRICS[name].label, tuple(series), about=about))
    return charts


def _steps_of(key: str) -> int:
    return int(key.rpartition("_")[2])
