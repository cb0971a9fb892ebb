"""Tables and bar charts of the benchmark's results."""

import json
from pathlib import Path
from typing import Any

from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.device import GIB

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PARTS = ("VAE and text encoder", "teacher", "target", "student, forward and backward", "clip, AdamW, EMA", "the rest")
SIDES = {"naive": "plain loop", "product": "lcmdistill", "cached": "lcmdistill, data.teacher_cache_samples=1"}


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    if "methods" in result:
        return methods_table(result)
    if "rows" in result:
        lines = [
            f"Peak memory, GiB ({result['device']}):\n",
            "| | batch | plain loop | lcmdistill | ratio |",
            "|---|---|---|---|---|",
        ]
        for name, kind, batch, one, other in result["rows"]:
            cells = [f"{value / GIB:.2f}" if value else "does not fit" for value in (one, other)]
            cells.append(f"{other / one:.2f}" if one and other else "")
            lines.append(f"| {name} {kind} | {batch} | {' | '.join(cells)} |")
        return "\n".join(lines)
    mean = {side: sum(losses) / len(losses) for side, losses in result["losses"].items()}
    lines = [
        f"{result['name']}, {result['device']}, {result['dtype']}, batch {result['batch']}, {result['rounds']} steps each "
        f"in turn; mean loss {mean['product']:.6f}, the plain loop's {mean['naive']:.6f}, at most "
        f"{result['loss_apart']:.1e} apart:\n",
        "| | samples/s | times the plain loop | of the matmul rate | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for side, values in result["sides"].items():
        speed = f"{values['samples_per_s']:.1f} | {values['ratio']:.2f} | {values['of_matmul']:.0%}"
        lines.append(f"| {SIDES[side]} | {speed} | {values['peak'] / GIB:.1f} |")
    names = [SIDES[side] for side in result["sides"]]
    lines += ["", f"| milliseconds of a step | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for part in PARTS:
        cells = [f"{values['milliseconds'][part]:.0f}" for values in result["sides"].values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def methods_table(result: dict[str, Any]) -> str:
    """Return the rows of gpu.py as Markdown. The plain loop's forward pass includes its backward pass."""
    phases = ("encoding", "teacher", "target", "forward", "backward", "optimizer", "other")
    lines = [
        f"Each method, {result['device']}, bf16, torch {result['torch']} (`python examples/bench/gpu.py`):\n",
        f"| | samples/s | MFU | peak memory, GiB | ms per step: {' | '.join(phases)} |",
        "|---|---|---|---|" + "---|" * len(phases),
    ]
    for row in result["methods"]:
        label = f"{row['model']} {row['kind']}, {row['method']}{', compiled' if row['compiled'] else ''}"
        if "error" in row:
            lines.append(f"| {label} | {row['error']} | " + "| " * (len(phases) + 2))
            continue
        cells = [f"{1000 * row.get(f'seconds_{phase}', 0.0) / row['steps']:.0f}" for phase in phases]
        memory = f"{row.get('peak_memory_gib', 0.0):.1f}"
        lines.append(f"| {label} | {row['samples_per_s']:.1f} | {row['mfu']:.0%} | {memory} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(result: dict[str, Any], path: Path) -> None:
    """Plot where the time of a step goes, one bar per side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    sides = list(result["sides"])[::-1]
    left = [0.0] * len(sides)
    for part, color in zip(PARTS, ("#8c564b", "#1f77b4", "#17a2a2", "#e07b1a", "#7f7f7f", "#c8c8c8"), strict=True):
        widths = [result["sides"][side]["milliseconds"][part] for side in sides]
        axes.barh([SIDES[side] for side in sides], widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(f"milliseconds a step of {result['batch']} samples, {result['device']}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def write_tables() -> None:
    """Write the tables of all results between the markers in README.md."""
    readme, marker = HERE / "README.md", "<!-- measured -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(marker)
    _, _, after = rest.partition(marker)
    order = sorted(RESULTS.glob("*.json"), key=lambda path: ("memory" in path.stem, path.stem))
    tables = "\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in order)
    write_text(readme, f"{before}{marker}\n\n{tables}\n\n{marker}{after}")
