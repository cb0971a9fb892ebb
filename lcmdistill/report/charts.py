"""Line charts, rendered by matplotlib: SVG for the pages, PNG for model cards.

An SVG takes its colors from the page's CSS variables, so it works in light and dark mode. Its text is text, and a description
states its numbers for readers who cannot see it.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lcmdistill.utils.atomic import atomic_file

COLORS = {
    "l0": "#0b7f84",
    "l1": "#c8640f",
    "l2": "#7c7f88",
    "l3": "#7a4fb5",
    "l4": "#3d7a2f",
    "l5": "#b83280",
    "level": "#1d2126",
    "soft": "#5b6470",
    "grid": "#ececea",
}
"the CSS variables of assets/report/page.css with their light colors, which the PNGs use"

RAW = 9
"the style of a thin line of single values behind its average"

_DASHES = {1: (4, 2), 2: (1, 2)}

_PNG_COLUMNS = 3

_SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: The name in the legend.
        points: (x, y) in ascending order of x.
        style: 0 student, 1 teacher, 2 teacher with trailing timesteps, 3 to 5 other runs, RAW single values.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        title: The heading.
        x: The label of the x axis.
        y: The label of the y axis.
        series: The lines.
        levels: (name, y) of horizontal lines.
        about: One sentence below the chart.
        log2_x: Whether x is a number of steps on a logarithmic axis.
        from_zero: Whether the y axis starts at 0.
        markers: Whether points are marked.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    levels: tuple[tuple[str, float], ...] = ()
    about: str = ""
    log2_x: bool = False
    from_zero: bool = False
    markers: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to plot."""
        return not any(series.points for series in self.series)


def short(value: float) -> str:
    """Format a number for an axis or a description: 0.05, 1.2, 400, 12500, 1e-4."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def describe_chart(chart: Chart) -> str:
    """Return the numbers of a chart as text, for readers who cannot see it."""
    parts = []
    for series in chart.series:
        if not series.points:
            continue
        (x_first, first), (x_last, last) = series.points[0], series.points[-1]
        if len(series.points) <= 8:
            parts.append(f"{series.name}: " + ", ".join(f"{short(y)} at {short(x)}" for x, y in series.points))
        else:
            low, high = min(y for _, y in series.points), max(y for _, y in series.points)
            parts.append(
                f"{series.name}: from {short(first)} at {short(x_first)} to {short(last)} at {short(x_last)}, "
                f"between {short(low)} and {short(high)}"
            )
    parts += [f"{name}: {short(y)}" for name, y in chart.levels]
    return f"{chart.y} against {chart.x}. " + "; ".join(parts)


def write_png(charts: Sequence[Chart], path: Path) -> Path:
    """Write charts side by side to one PNG on white, atomically, and return its path. charts: not empty."""
    columns = min(_PNG_COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    figure = _figure(4.2 * columns, 3.3 * rows, layout="constrained")
    for i, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, i + 1)
        _plot(axes, chart)
        axes.set_title(chart.title, fontsize=11, loc="left", fontweight="bold")
        if len(chart.series) > 1 or chart.levels:
            axes.legend(fontsize=7.5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return path


def to_svg(chart: Chart, number: int) -> str:
    """Return a chart as an inline SVG. The page adds the title and the legend.

    Args:
        chart: The chart. Not empty.
        number: The chart's number on its page, for unique ids.
    """
    from matplotlib import rc_context

    figure = _figure(3.8, 2.4)
    axes = figure.add_axes((0.14, 0.16, 0.83, 0.79))
    _plot(axes, chart)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lcmdistill"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(ElementTree.fromstring(buffer.getvalue()), chart, number)


def _figure(width: float, height: float, **options: Any) -> Any:
    """Return a figure without pyplot, which would keep it and choose a backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def _plot(axes: Any, chart: Chart) -> None:
    for i, series in reversed(list(enumerate(chart.series))):
        if not series.points:
            continue
        is_raw = series.style == RAW
        (line,) = axes.plot(
            *zip(*series.points, strict=True),
            color=COLORS["l2" if is_raw else f"l{series.style}"],
            alpha=0.5 if is_raw else 1.0,
            linewidth=1.0 if is_raw else 1.8,
            marker="o" if chart.markers or len(series.points) == 1 else None,
            markersize=4.5,
            label=series.name,
            clip_on=False,
            gid=f"series-{i}",
        )
        if series.style in _DASHES:
            line.set_dashes(_DASHES[series.style])
    for i, (name, y) in enumerate(chart.levels):
        axes.axhline(
            y, color=COLORS["level"], linewidth=1.1, linestyle=":", label=name, clip_on=False, gid=f"level-{i}"
        )
    if chart.log2_x:
        steps = sorted({x for series in chart.series for x, _ in series.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [short(x) for x in steps])
        axes.minorticks_off()
    if chart.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.get_ylim()[0] < 0 and _lowest(chart) < 0 else 0.0)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.get_major_locator().set_params(nbins=6)
    if not chart.log2_x:
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.xaxis.get_major_locator().set_params(nbins=6)
    axes.set_xlabel(chart.x, fontsize=9, color=COLORS["soft"])
    axes.tick_params(labelsize=8.5, labelcolor=COLORS["soft"], color=COLORS["grid"], length=0)
    axes.grid(axis="y", color=COLORS["grid"])
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["grid"])


def _lowest(chart: Chart) -> float:
    return min([y for series in chart.series for _, y in series.points] + [y for _, y in chart.levels])


def _inline(root: ElementTree.Element, chart: Chart, number: int) -> str:
    """Turn matplotlib's SVG document into an element of a page: no references, CSS colors, a title and a description."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}defs")):
                parent.remove(child)
    for i, series in enumerate(chart.series):
        group = root.find(f".//{_SVG}g[@id='series-{i}']")
        if group is not None:
            _add_tooltips(group, series)
    for i, (name, y) in enumerate(chart.levels):
        group = root.find(f".//{_SVG}g[@id='level-{i}']")
        if group is not None:
            _child(group, "title", f"{name}: {short(y)}")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib.pop("id", None)
        element.attrib.pop("clip-path", None)  # nothing is outside the axes
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    title, description = f"c{number}t", f"c{number}d"
    root.attrib |= {"class": "chart", "role": "img", "aria-labelledby": f"{title} {description}"}
    for position, (tag, name, text) in enumerate(
        (("title", title, chart.title), ("desc", description, describe_chart(chart)))
    ):
        element = ElementTree.Element(tag, {"id": name})
        element.text = text
        root.insert(position, element)
    svg = ElementTree.tostring(root, encoding="unicode")
    for variable, color in COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # the page's own font
    return re.sub(r"(<g />)+|<g>(<g />)*</g>", "", svg)


def _add_tooltips(group: ElementTree.Element, series: Series) -> None:
    """Replace the references to a marker with circles that show their numbers."""
    for parent in list(group.iter()):
        uses = [child for child in parent if child.tag == f"{_SVG}use"]
        for use, (x, y) in zip(uses, series.points if uses else (), strict=True):
            parent.remove(use)
            style = re.sub(r"stroke: [^;]+", "stroke: var(--card)", use.get("style", ""))
            circle = ElementTree.SubElement(
                parent, f"{_SVG}circle", {"cx": use.get("x", ""), "cy": use.get("y", ""), "r": "2.9", "style": style}
            )
            _child(circle, "title", f"{series.name}, {short(x)}: {short(y)}")


def _child(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, f"{_SVG}{tag}").text = text
