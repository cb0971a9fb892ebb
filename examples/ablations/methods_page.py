"""Write methods.md, its figure and its picture grid from the numbers of the runs of methods.py. The code checks the claims."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from methods import (
    BATCH,
    FOLDERS,
    HOLDOUT,
    IMAGES,
    NUM_PROMPTS,
    OMEGA,
    RUNS,
    SEEDS,
    STEPS,
    TDM_COST,
    TRAIN_STEPS,
    TRAJECTORY,
    tdm_steps,
)
from PIL import Image, ImageDraw

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.units import counted

Numbers = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
"{seed: {run: {point: {metric: number}}}}"

SCALE = f"{OMEGA + 1:g}"
TITLES = {
    "rmse": "latent RMSE to the teacher",
    "kid_teacher": "KID to the teacher",
    "sharpness": "sharpness",
    "saturation": "saturation",
    "diversity": "diversity",
}
RELATIVE = ("sharpness", "saturation", "diversity")
"metrics that are 1 for the teacher itself"

TRAINED_FOR = "trained for as many steps"
PANELS: dict[str, dict[str, Sequence[str]]] = {
    "methods": {
        "LCM": ["LCM"] * 4,
        "TCD": ["TCD"] * 4,
        f"PCM, {TRAINED_FOR}": ["PCM, 1 phase", "PCM, 2 phases", "PCM, 4 phases"],
        f"TDM, {TRAINED_FOR}": ["TDM, 1 segment", "TDM, 2 segments", "TDM, 4 segments"],
    },
    "phases of PCM, segments of TDM": {
        name: [name] * 4
        for name in (
            *("PCM, 2 phases", "PCM, 4 phases", "PCM, 2 phases, free", "PCM, 4 phases, free"),
            *("TDM, 2 segments", "TDM, 4 segments"),
        )
    },
    f"data.trajectory={TRAJECTORY}": {
        name + end: [name + end] * 4 for name in ("LCM", "TCD", "PCM, 2 phases") for end in ("", ", trajectory")
    },
}
"the columns of the figure: {line: the run at each of STEPS}"


COLORS = {"LCM": "C0", "TCD": "C1", "PCM": "C2", "TDM": "C3", "free": "C4"}


class Claim(NamedTuple):
    """What is claimed, whether these numbers show it, the numbers, and whether all their differences are within the error."""

    text: str
    shows: bool
    evidence: str
    close: bool

    @property
    def verdict(self) -> str:
        """What the page says of it."""
        return "no measurable difference" if self.close else "shows" if self.shows else "**does not show**"


def values(numbers: Numbers, run: str, metric: str, steps: int, sampler: str = "student") -> list[float]:
    """Return a run's number of each seed that has it."""
    point = f"{sampler}-{steps:02d}-g{SCALE}"
    found = (runs.get(run, {}).get(point, {}).get(metric) for _, runs in sorted(numbers.items()))
    return [value for value in found if value is not None]


def number(value: float) -> str:
    """Return a number with three digits after the point, or two from 1 on."""
    rounded = round(value, 3) + 0.0  # without the sign of a negative zero
    return f"{value:.2f}" if abs(value) >= 1 else f"{rounded:.3f}".replace("0.", ".", 1)


def spread(found: Sequence[float]) -> str:
    """Return the mean, and the smallest and largest value of several seeds."""
    if not found:
        return ""
    ends = f" ({number(min(found))} to {number(max(found))})" if len(found) > 1 else ""
    return number(mean(found)) + ends


def within_error(numbers: Numbers, a: tuple[str, str, int], b: tuple[str, str, int]) -> bool:
    """Return whether two numbers (run, metric, steps) differ by less than the standard error of their difference.

    More seeds do not make it smaller, because all are evaluated on the same prompts and noise.
    """
    errors = [values(numbers, run, f"{metric}_error", steps) for run, metric, steps in (a, b)]
    if not all(errors):
        return False
    means = [mean(values(numbers, *each)) for each in (a, b)]
    return abs(means[0] - means[1]) < sum(mean(each) ** 2 for each in errors) ** 0.5


def claims(numbers: Numbers) -> list[Claim]:
    """Return what the methods are meant to do, checked by the means over the seeds. Claims without numbers are left out."""
    found: list[Claim] = []

    def claim(text: str, holds: Callable[..., bool], *points: tuple[str, str, int]) -> None:
        each = [values(numbers, *point) for point in points]
        if all(each):
            labels = [
                f"{run} at {_steps(steps)}: {spread(of)}" for (run, _, steps), of in zip(points, each, strict=True)
            ]
            close = [
                f"{run} at {_steps(n)}" for run, _, n in points[1:] if within_error(numbers, points[0], (run, _, n))
            ]
            labels += [f"the difference from {' and from '.join(close)} is within its standard error"] if close else []
            all_close = len(points) > 1 and len(close) == len(points) - 1
            found.append(Claim(text, holds(*map(mean, each)), "; ".join(labels), all_close))

    def kid(run: str, steps: int) -> tuple[str, str, int]:
        return run, "kid_teacher", steps

    def at_most(a: float, *others: float) -> bool:
        return all(a <= other for other in others)

    pcm = {1: "PCM, 1 phase", 2: "PCM, 2 phases", 4: "PCM, 4 phases"}
    tdm = {1: "TDM, 1 segment", 2: "TDM, 2 segments", 4: "TDM, 4 segments"}
    claim(
        "PCM of 2 phases at 2 steps: KID at most LCM's at 2 steps and at 1 step",
        at_most,
        *(kid(pcm[2], 2), kid("LCM", 2), kid("LCM", 1)),
    )
    for n in (1, 4):
        claim(f"PCM trained for {_steps(n)}: KID at most LCM's at {_steps(n)}", at_most, kid(pcm[n], n), kid("LCM", n))
    for n in (1, 2, 4):
        claim(
            f"PCM trained for {_steps(n)}: RMSE at most LCM's at {_steps(n)}",
            at_most,
            *((pcm[n], "rmse", n), ("LCM", "rmse", n)),
        )
    for n in (2, 4):
        claim(
            f"PCM of {n} phases with CFG at sampling (free): KID at most that with baked guidance at {_steps(n)}",
            at_most,
            *(kid(f"{pcm[n]}, free", n), kid(pcm[n], n)),
        )
    for n, run in tdm.items():
        claim(f"TDM trained for {_steps(n)}: KID at most LCM's at {_steps(n)}", at_most, kid(run, n), kid("LCM", n))
        claim(
            f"TDM trained for {_steps(n)}: sharpness within 10 % of the teacher's",
            lambda value: 0.9 <= value <= 1.1,
            (run, "sharpness", n),
        )
        claim(
            f"TDM trained for {_steps(n)}: diversity at least .9 of the teacher's",
            lambda value: value >= 0.9,
            (run, "diversity", n),
        )
    for run in ("LCM", "TCD", "PCM, 2 phases"):
        for n in (1, 2):
            for metric in ("rmse", "kid_teacher"):
                claim(
                    f"{run} with `data.trajectory={TRAJECTORY}`: {_short(metric)} below that without at {_steps(n)}",
                    lambda with_it, without: with_it < without,
                    *((f"{run}, trajectory", metric, n), (run, metric, n)),
                )
    return found


def _steps(steps: int) -> str:
    return counted(steps, "step")


def _short(metric: str) -> str:
    return {"rmse": "RMSE", "kid_teacher": "KID"}.get(metric, metric)


# -- the figure ------------------------------------------------------------------------------------------------------


def draw(numbers: Numbers, path: Path) -> None:
    """Write the figure: a row per metric, a column per comparison; a line is the mean of the seeds, a band their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(PANELS), 2.3 * len(TITLES) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (metric, title) in enumerate(TITLES.items()):
        for column, (head, lines) in enumerate(PANELS.items()):
            axes = figure.add_subplot(len(TITLES), len(PANELS), row * len(PANELS) + column + 1)
            for name, runs in lines.items():
                _line(axes, numbers, metric, name, runs)
            if metric in RELATIVE:
                axes.axhline(1, color="gray", linestyle=":", linewidth=1)
            if metric in ("rmse", "kid_teacher") and column == 0:
                few = [values(numbers, "LCM", metric, n, "trailing") for n in STEPS]
                if all(few):
                    axes.plot(
                        range(len(STEPS)), list(map(mean, few)), color="gray", linestyle=":", label="teacher, trailing"
                    )
            axes.set_xticks(range(len(STEPS)), [str(n) for n in STEPS])
            _limit(axes, numbers, metric, lines.values())
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(title, fontsize=9)
            if row == 0:
                axes.set_title(head, fontsize=10)
                if axes.lines:
                    axes.legend(fontsize=7)
            if row == len(TITLES) - 1:
                axes.set_xlabel("sampling steps")
    figure.savefig(path, dpi=90)


def _line(axes: Any, numbers: Numbers, metric: str, name: str, runs: Sequence[str]) -> None:
    """Plot one line. Its color is the method's; a second line of a method is dashed."""
    found = [values(numbers, run, metric, n) for run, n in zip(runs, STEPS, strict=False)]
    places = [place for place, each in enumerate(found) if each]
    if not places:
        return
    color = COLORS["free" if name.endswith("free") else name[:3]]
    dashed = name.endswith("trajectory") or ", 4 " in name
    means = [mean(found[place]) for place in places]
    axes.plot(places, means, color=color, linestyle="--" if dashed else "-", marker="s" if dashed else "o", label=name)
    low, high = [min(found[p]) for p in places], [max(found[p]) for p in places]
    axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)


def _limit(axes: Any, numbers: Numbers, metric: str, lines: Iterable[Sequence[str]]) -> None:
    """Give a panel a scale that its students fill; the few-step teacher may leave it."""
    points = [(run, n) for runs in lines for run, n in zip(runs, STEPS, strict=False)]
    found = [each for run, n in points for each in values(numbers, run, metric, n)]
    if found:
        low, high = min(found), max(found)
        margin = 0.05 * (high - low or 1)
        axes.set_ylim(low - margin, high + margin)


# -- the pictures ----------------------------------------------------------------------------------------------------

SIDE, GAP, HEAD = 96, 4, 18


def columns() -> list[tuple[str, str, str]]:
    """Return the columns of the picture grid: (head, run, point)."""
    found = [("teacher 50", "LCM", f"teacher-50-g{SCALE}")]
    for n, end in ((1, ""), (2, "s"), (4, "s")):
        runs = (("LCM", "LCM"), ("PCM", f"PCM, {n} phase{end}"), ("TDM", f"TDM, {n} segment{end}"))
        found += [(f"{name} {n}", run, f"student-{n:02d}-g{SCALE}") for name, run in runs]
    return found


def grid(path: Path, seed: int = SEEDS[0]) -> bool:
    """Write the picture grid of a seed: a row per prompt. Return False if a run of it has no pictures."""
    files = [
        sorted((RUNS / f"seed-{seed}" / FOLDERS[run] / "evaluation" / "points" / point).glob("*.webp"))
        for _, run, point in columns()
    ]
    if not all(files):
        return False
    rows = min(map(len, files))
    lefts = [i * (SIDE + GAP) + 3 * GAP * -(-i // 3) for i in range(len(files))]  # a gap after the teacher, and per 3
    sheet = Image.new("RGB", (lefts[-1] + SIDE, HEAD + rows * (SIDE + GAP)), "white")
    drawing = ImageDraw.Draw(sheet)
    for left, (head, _, _), of in zip(lefts, columns(), files, strict=True):
        drawing.text((left + 2, 3), head, fill="black")
        for row in range(rows):
            with Image.open(of[row]) as picture:
                tile = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, HEAD + row * (SIDE + GAP)))
    sheet.save(path, optimize=True)
    return True


# -- the page --------------------------------------------------------------------------------------------------------


def table(numbers: Numbers, metric: str) -> str:
    """Return a metric of all runs as a Markdown table."""
    rows = [f"| run | {' | '.join(map(_steps, STEPS))} |", f"|---|{'---|' * len(STEPS)}"]
    for run in FOLDERS:
        cells = [spread(values(numbers, run, metric, n)) for n in STEPS]
        if any(cells):
            rows.append(f"| {run} | {' | '.join(cells)} |")
    for sampler, name in (("teacher", "teacher"), ("trailing", "teacher, trailing")):
        cells = [spread(values(numbers, "LCM", metric, n, sampler)[:1]) for n in STEPS]
        if any(cells):
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def seeds_text(numbers: Numbers) -> str:
    """Return which seeds the page has, in one sentence."""
    complete = [seed for seed in SEEDS if len(numbers.get(str(seed), {})) == len(FOLDERS)]
    partial = [seed for seed in SEEDS if 0 < len(numbers.get(str(seed), {})) < len(FOLDERS)]
    text = f"Complete seeds: {', '.join(map(str, complete)) or 'none'} of {', '.join(map(str, SEEDS))}"
    if partial:
        text += "; partial: " + ", ".join(
            f"{seed} ({len(numbers[str(seed)])} of {len(FOLDERS)} runs)" for seed in partial
        )
    if len(complete) < len(SEEDS):
        text += ". The command trains the missing runs"
    return text + "."


def write_page(numbers: Numbers, folder: Path) -> None:
    """Write methods.md, methods.png and, where the runs are there, methods_grid.png."""
    draw(numbers, folder / "methods.png")
    grid(folder / "methods_grid.png")
    held_out = round(NUM_PROMPTS * HOLDOUT)
    lengths = ", ".join(f"{tdm_steps(k)} with {k}" for k in TDM_COST)
    ratios = ", ".join(f"{cost:g}" for cost in TDM_COST.values())
    parts = [
        "# LCM, TCD, PCM and TDM, small",
        "",
        "```sh\npython examples/ablations/methods.py\n```",
        "",
        f"Full students of the bundled teacher. LCM, TCD and PCM see the same samples: {TRAIN_STEPS} steps of {BATCH}, on "
        f"latents that the teacher generates in 16 steps for {NUM_PROMPTS - held_out} captions. All have omega {OMEGA:g}, "
        "an EMA of .95 and a learning rate of 1e-4; the published rates of PCM and TDM (5e-6 and 2e-6) are for larger models "
        f"and longer runs. TDM uses the captions only, without latents, and has the time of LCM's run: {lengths} "
        f"segments. This follows from the operations of a step, {ratios} times LCM's, and so does not depend on what else the "
        "machine computes. The time that LCM, TCD and PCM need for the teacher's latents is not counted.",
        "",
        f"{IMAGES} images on {held_out} captions that no student saw, from the same noise, at guidance scale {SCALE}. The "
        "reference is the teacher at 50 steps on the same captions. RMSE is over latents. KID takes MobileNetV2 features; "
        f"{_of_kid(numbers)}. Sharpness, saturation and diversity are relative to the "
        "teacher; 1 is best. Each number is the mean of the seeds, with the smallest and the largest in brackets. TCD is "
        "sampled with its default fresh noise, eta .3. A PCM or TDM student is meant for as many steps as it has phases "
        "or segments. The results do not transfer to larger models.",
        "",
        seeds_text(numbers),
        "",
        "## What it shows",
        "",
        "| claim | here | numbers |",
        "|---|---|---|",
        *(f"| {c.text} | {c.verdict} | {c.evidence} |" for c in claims(numbers)),
        "",
        "![The methods by sampling steps](methods.png)",
        "",
        "Lines are means over the seeds, bands the range of the seeds.",
        "",
        *_pictures(folder),
    ]
    for metric, title in TITLES.items():
        parts += [f"## {title[0].upper()}{title[1:]}", "", table(numbers, metric), ""]
    write_text(folder / "methods.md", "\n".join(parts))


def _of_kid(numbers: Numbers) -> str:
    """Return the sentence part that states which KID differences are measurable."""
    same = values(numbers, "LCM", "kid_teacher", TEACHER_STEPS, "teacher")
    errors = [e for run in FOLDERS for n in STEPS for e in values(numbers, run, "kid_teacher_error", n)]
    text = "at or below zero there is no measurable difference"
    if same and errors:
        text += (
            f", the teacher's set compared with itself has {number(same[0])}, and the standard error of a number is "
            f"{number(min(errors))} to {number(max(errors))}"
        )
    return text


def _pictures(folder: Path) -> list[str]:
    if not (folder / "methods_grid.png").is_file():
        return []
    text = f"Seed {SEEDS[0]}, the same noise in each row: the teacher at 50 steps, and LCM, PCM and TDM at 1, 2 and 4 steps"
    return ["![Teacher, LCM, PCM and TDM](methods_grid.png)", "", f"{text}, each trained for that number.", ""]
