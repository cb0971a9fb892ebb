"""The same charts as pictures, for a model card: PNGs by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcmdistill.report.charts import Chart, short

COLOURS = ("#0b7f84", "#c8640f", "#7c7f88", "#7a4fb5", "#3d7a2f", "#b83280")

_DASHES = {1: (4, 2), 2: (1, 2)}

COLUMNS = 3


def write_plots(charts: Sequence[Chart], path: Path) -> Path:
    """Charts side by side in one PNG, on white, whole or not there; returns its path. charts: not empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    # No pyplot: it keeps figures, and a backend, for the whole process.
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, chart in enumerate(charts):
        _draw(figure.add_subplot(rows, columns, place + 1), chart)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", metadata={"Software": None})
    aside.replace(path)
    return path


def _draw(axes: Any, chart: Chart) -> None:
    for series in reversed(chart.series):
        if not series.points:
            continue
        xs, ys = zip(*series.points, strict=True)
        raw = series.look >= len(COLOURS)
        (line,) = axes.plot(
            xs,
            ys,
            color=COLOURS[2] if raw else COLOURS[series.look],
            alpha=0.5 if raw else 1.0,
            linewidth=1.0 if raw else 1.8,
            marker="o" if chart.markers else None,
            markersize=4.5,
            label=series.name,
        )
        if series.look in _DASHES:
            line.set_dashes(_DASHES[series.look])
    for name, y in chart.levels:
        axes.axhline(y, color="#1d2125", linewidth=1.1, linestyle=":", label=name)
    if chart.doubling:
        steps = sorted({x for series in chart.series for x, _ in series.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [short(x) for x in steps])
        axes.minorticks_off()
    if chart.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.get_ylim()[0] < 0 else 0.0)
    axes.set_title(chart.title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(chart.x, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y", color="#ececea")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(chart.series) > 1 or chart.levels:
        axes.legend(fontsize=7.5, frameon=False)
