"""Write the ablations' figures and README.md from the numbers of their runs. The code checks the claims of the papers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from run import (
    COMPARED,
    DECAYS,
    IMAGES,
    LONG,
    LONGEST,
    MANY,
    MANY_IMAGES,
    OMEGAS,
    SHORT,
    SKIPS,
    SOLVERS,
    STEPS,
)

from lcmdistill.utils.atomic import write_text

Numbers = Mapping[str, Mapping[str, Mapping[str, float]]]
TITLES = {
    "rmse": "latent RMSE to the teacher's 50 steps",
    "kid_teacher": "KID (MobileNetV2) to the teacher's 50 steps",
    "kid": "KID (MobileNetV2) to real images",
}
MEASURES = ("rmse", "kid")
NAMES = {"ddim": "DDIM", "dpm-solver": "DPM-Solver", "dpm-solver++": "DPM-Solver++"}


class Claim(NamedTuple):
    """A finding of a paper, whether these numbers show it, and the numbers."""

    paper: str
    shows: bool
    evidence: str


def value(numbers: Numbers, run: str, measure: str, steps: int, omega: float = 4.0) -> float:
    """Return a student's number; lower is better for both measures."""
    return numbers[run][f"student-{steps:02d}-g{omega + 1:g}"][measure]


def teacher_kid(numbers: Numbers, omega: float = 4.0, run: str = "lcm") -> float:
    """Return the KID of the teacher at 50 steps to real images, on the captions of a run."""
    return numbers[run][f"teacher-50-g{omega + 1:g}"]["kid"]


def decay_run(mu: float) -> str:
    """Return the name of the run with an EMA rate of the target."""
    return "lcm" if mu == 0.95 else f"ema-{mu:g}"


def claims(numbers: Numbers) -> dict[str, list[Claim]]:
    """Return the papers' findings, by figure."""

    def get(run: str, measure: str, steps: int, omega: float = 4.0) -> float:
        return value(numbers, run, measure, steps, omega)

    def listed(of: Callable[[Any], float], keys: Sequence[Any]) -> str:
        return ", ".join(f"{key}: {of(key):.3f}" for key in keys)

    rmse = {(k, s): get(f"k{k}-{s}", "rmse", 2) for k in SKIPS for s in SOLVERS}
    slow = all(rmse[1, s] > max(rmse[k, s] for k in (5, 10, 20)) for s in SOLVERS)
    better = [s for s in SOLVERS[1:] if rmse[50, s] < rmse[50, "ddim"]]
    lag = [get("lcm", "kid", n) for n in STEPS]
    kid_rise = [get("lcm", "kid", 4, w) for w in OMEGAS]
    labels = {"rmse": "RMSE to the teacher", "kid_teacher": "KID to the teacher", "kid": "KID to real images"}
    many = {measure: [[get(run, measure, n) for n in MANY] for run in COMPARED] for measure in labels}
    decays = {mu: get(decay_run(mu), "rmse", 2) for mu in DECAYS}
    return {
        "skip_solver": [
            Claim(
                "k = 1 converges slowly, k = 5 to 20 fast (Luo et al. 2023, sec. 5.2)",
                slow,
                "RMSE at 2 steps with DDIM by k: " + listed(lambda k: rmse[k, "ddim"], SKIPS),
            ),
            Claim(
                "at k = 50 DPM-Solver and DPM-Solver++ beat DDIM, whose step is then too coarse (the same)",
                len(better) == 2,
                "RMSE at 2 steps with k = 50: " + listed(lambda s: rmse[50, s], SOLVERS),
            ),
        ],
        "omega": [
            Claim(
                "a larger omega costs FID (Luo et al. 2023, sec. 5.2)",
                all(a < b for a, b in pairwise(kid_rise)),
                "KID at 4 steps by omega: " + ", ".join(f"{w}: {v:.3f}" for w, v in zip(OMEGAS, kid_rise, strict=True)),
            ),
            Claim(
                "2 to 8 steps are close together and 1 step lags (the same)",
                lag[0] - lag[1] > max(lag[1:]) - min(lag[1:]),
                "KID at 1, 2, 4, 8 steps, omega 4: " + ", ".join(f"{v:.3f}" for v in lag),
            ),
        ],
        "lcm_tcd": [claim for measure, label in labels.items() for claim in _many_steps(many[measure], label)],
        "ema": [
            Claim(
                "a target that lags behind the student stabilizes distillation (Song et al. 2023, mu = .95 and above)",
                decays[0.0] > decays[0.95],
                "RMSE at 2 steps by mu: " + listed(lambda mu: decays[mu], DECAYS),
            ),
            Claim(
                "no lag at all, mu = 0, is best (Song & Dhariwal 2023, of training without a teacher)",
                decays[0.0] == min(decays.values()),
                "the same numbers",
            ),
        ],
    }


def _many_steps(found: Sequence[Sequence[float]], label: str) -> list[Claim]:
    """Return the findings on LCM and TCD at many steps, by one measure. found: the numbers of each run of COMPARED."""
    lcm, tcd, straight = found
    return [
        Claim(
            f"in {label}, LCM's images get worse from 4 steps on (Zheng et al. 2024, Fig. 1)",
            lcm[2] < lcm[3] < lcm[4],
            f"LCM at {_by_steps(lcm)}",
        ),
        Claim(
            f"in {label}, TCD is at least as good at 8 and 16 steps (the same)",
            all(tcd[i] <= lcm[i] for i in (3, 4)),
            f"TCD, eta 0.3, at {_by_steps(tcd)}",
        ),
        Claim(
            f"in {label}, TCD without fresh noise, eta 0, does not get worse from 4 to 16 steps (the same)",
            straight[4] <= 1.05 * straight[2],
            f"TCD, eta 0, at {_by_steps(straight)}",
        ),
    ]


def _by_steps(values: Sequence[float]) -> str:
    return ", ".join(f"{n}: {v:.3f}" for n, v in zip(MANY, values, strict=True))


# -- figures ---------------------------------------------------------------------------------------------------------

Lines = Mapping[str, Sequence[float]]


def draw(path: Path, xs: Sequence[float], panels: Mapping[str, Lines], label: str, flat: float | None = None) -> None:
    """Write a PNG with one panel per measure and one line per name. flat: the teacher's KID, a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (measure, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for (name, values), mark in zip(lines.items(), "osD^v", strict=False):
            axes.plot(range(len(xs)), values, marker=mark, label=name)
        if measure == "kid" and flat is not None:
            axes.axhline(flat, color="grey", linestyle="--", label="teacher, 50 steps")
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_xlabel(label)
        axes.set_title(TITLES[measure], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def figures(numbers: Numbers, folder: Path) -> None:
    """skip_solver.png, omega.png, lcm_tcd.png, ema.png."""
    flat = teacher_kid(numbers)

    def panels(of: Callable[[str], Lines], measures: Iterable[str] = MEASURES) -> dict[str, Lines]:
        return {measure: of(measure) for measure in measures}

    def get(run: str, measure: str, steps: int, omega: float = 4.0) -> float:
        return value(numbers, run, measure, steps, omega)

    by_solver = panels(lambda m: {NAMES[s]: [get(f"k{k}-{s}", m, 2) for k in SKIPS] for s in SOLVERS})
    draw(folder / "skip_solver.png", SKIPS, by_solver, f"k, after {SHORT} steps; sampled in 2 steps", flat)
    by_omega = panels(lambda m: {f"omega {w}": [get("lcm", m, n, w) for n in STEPS] for w in OMEGAS})
    draw(folder / "omega.png", STEPS, by_omega, "steps", flat)
    by_method = panels(lambda m: {name: [get(run, m, n) for n in MANY] for run, name in COMPARED.items()}, TITLES)
    draw(folder / "lcm_tcd.png", MANY, by_method, "steps", teacher_kid(numbers, run="lcm-long"))
    by_decay = panels(
        lambda m: {f"{n} step{'s' * (n > 1)}": [get(decay_run(mu), m, n) for mu in DECAYS] for n in (1, 2, 4)}
    )
    draw(folder / "ema.png", DECAYS, by_decay, "mu of the target", flat)


# -- the page --------------------------------------------------------------------------------------------------------

HEADS = {
    "skip_solver": "The skipping step k and the solver",
    "omega": "Omega and the number of steps",
    "lcm_tcd": "LCM and TCD, from 1 to 16 steps",
    "ema": "The target's EMA",
}


def table(numbers: Numbers) -> str:
    """Return all numbers as a Markdown table."""
    rows = [f"| run | omega | {' | '.join(f'RMSE, KID at {n}' for n in MANY)} |", f"|---|---|{'---|' * len(MANY)}"]
    for run, cells in numbers.items():
        for omega in OMEGAS:
            found = [cells.get(f"student-{n:02d}-g{omega + 1}") for n in MANY]
            if any(found):
                rows.append(f"| {run} | {omega} | {' | '.join(map(_numbers, found))} |")
    for omega in OMEGAS:
        rows.append(f"| teacher, 50 steps: KID {teacher_kid(numbers, omega):.3f} | {omega} |{' |' * len(MANY)}")
    return "\n".join(rows)


def _numbers(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return ""
    to_teacher = f" ({cell['kid_teacher']:.3f} to the teacher)" if "kid_teacher" in cell else ""
    return f"{cell['rmse']:.3f}, {cell['kid']:.3f}{to_teacher}"


def _of_kid(numbers: Numbers) -> str:
    """Return what KID to real images means here, compared with that of the teacher."""
    reference = teacher_kid(numbers, run="lcm-long")
    of_students = [value(numbers, run, "kid", n) for run in COMPARED for n in MANY[2:]]
    below = sum(kid < reference for kid in of_students)
    return (
        f"{below} of the {len(of_students)} students' KIDs at 4 steps and more are below that of their teacher, "
        f"{reference:.3f} at 50 steps: a lower KID here does not mean that a student is closer to its teacher. "
        "A KID to the teacher of zero or below means no measurable difference: both sets have the same captions and "
        "start noise."
    )


def write_report(numbers: Numbers, folder: Path) -> None:
    """Write README.md and its figures."""
    figures(numbers, folder)
    found = claims(numbers)
    parts = [
        "# The papers' ablations, small",
        "",
        "```sh\npython examples/ablations/run.py\n```",
        "",
        f"The bundled teacher, batches of 16 emoji, learning rate 1e-4, omega drawn from 1 to 9, pseudo-Huber, one seed. "
        f"`lcm` and the EMA runs are {LONG} optimizer steps long, those of k and solver {SHORT}, and LCM and TCD {LONGEST}: "
        f"{LONG * 16:,}, {SHORT * 16:,} and {LONGEST * 16:,} samples, at most a thousandth of the papers'. {IMAGES} held-out "
        f"captions, {MANY_IMAGES} for LCM and TCD, the same start noise for all; lower is better. One seed and so few images "
        "show large effects only. Each ablation is one `lcmdistill sweep` (`--list` prints the commands), and the command "
        "above writes this page, including the verdicts.",
        "",
    ]
    for figure, head in HEADS.items():
        parts += [
            f"## {head}",
            "",
            f"![{head}]({figure}.png)",
            "",
            "| what the paper found | here | numbers |",
            "|---|---|---|",
        ]
        parts += [
            f"| {c.paper} | {'shows' if c.shows else '**does not show**'} | {c.evidence} |" for c in found[figure]
        ]
        parts += ["", *([_of_kid(numbers), ""] if figure == "lcm_tcd" else [])]
    parts += ["## All numbers", "", table(numbers), ""]
    write_text(folder / "README.md", "\n".join(parts))
