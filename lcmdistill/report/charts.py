"""Line charts: what is drawn, and drawing it as SVG that takes its colours from the page, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 240

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 14, 40


@dataclass(frozen=True)
class Series:
    """One line. points: (x, y), x rising; look: 0 student, 1 teacher, 2 teacher started late, 3 and on: other runs."""

    name: str
    points: tuple[tuple[float, float], ...]
    look: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart and what it says. levels: (name, y) of horizontal lines; doubling: x is steps, each twice the last.

    about: one sentence below it.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    levels: tuple[tuple[str, float], ...] = ()
    about: str = ""
    doubling: bool = False
    from_zero: bool = False
    markers: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(series.points for series in self.series)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most `most` + 1 of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / most
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(chart: Chart) -> tuple[float, float]:
    """The lowest and the highest y that a chart shows."""
    values = [y for series in chart.series for _, y in series.points] + [y for _, y in chart.levels]
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(low, 0.0)
    room = (high - low or abs(high) or 1.0) * 0.08
    return low - (0.0 if chart.from_zero and low == 0 else room), high + room


def short(value: float) -> str:
    """A number for a tick: 0.05, 1.2, 400, 12500, 1e-4."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def to_svg(chart: Chart, number: int) -> str:
    """The chart as an inline SVG. number: of the chart on its page, for ids of its own."""
    xs = sorted({x for series in chart.series for x, _ in series.points})
    low, high = limits(chart)
    x_low, x_high = (math.log2(xs[0]), math.log2(xs[-1])) if chart.doubling else (xs[0], xs[-1])
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def at_x(x: float) -> float:
        share = ((math.log2(x) if chart.doubling else x) - x_low) / (x_high - x_low)
        inset = 16 if chart.doubling else 4
        return _LEFT + inset + share * (WIDTH - _LEFT - _RIGHT - 2 * inset)

    def at_y(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="c{number}t c{number}d">',
        f'<title id="c{number}t">{escape(chart.title)}</title><desc id="c{number}d">{escape(described(chart))}</desc>',
    ]
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{at_y(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in xs if chart.doubling else ticks(xs[0], xs[-1]):
        parts.append(
            f'<text class="tick" x="{at_x(x):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{short(x)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x)}</text>')
    for name, y in chart.levels:
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}">'
            f"<title>{escape(name)}: {short(y)}</title></line>"
        )
    for series in reversed(chart.series):
        parts += _line(series, [(at_x(x), at_y(y)) for x, y in series.points], chart.markers)
    return "".join(parts) + "</svg>"


def _line(series: Series, places: Sequence[tuple[float, float]], markers: bool) -> list[str]:
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line l{series.look}" d="{path}"/>'] if len(places) > 1 else []
    if markers or len(places) == 1:
        for (x, y), (at, value) in zip(places, series.points, strict=True):
            said = f"{escape(series.name)}, {short(at)}: {short(value)}"
            parts.append(
                f'<circle class="dot l{series.look}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{said}</title></circle>'
            )
    return parts


def described(chart: Chart) -> str:
    """What a chart shows, for those who do not see it."""
    said = []
    for series in chart.series:
        if not series.points:
            continue
        (x_first, first), (x_last, last) = series.points[0], series.points[-1]
        if len(series.points) <= 8:
            said.append(f"{series.name}: " + ", ".join(f"{short(y)} at {short(x)}" for x, y in series.points))
        else:
            low, high = min(y for _, y in series.points), max(y for _, y in series.points)
            said.append(
                f"{series.name}: from {short(first)} at {short(x_first)} to {short(last)} at {short(x_last)}, "
                f"between {short(low)} and {short(high)}"
            )
    said += [f"{name}: {short(y)}" for name, y in chart.levels]
    return f"{chart.y} against {chart.x}. " + "; ".join(said)
