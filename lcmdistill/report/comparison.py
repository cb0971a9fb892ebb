"""The page that compares several runs, evaluated on the same prompts and noise."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.verdict import seconds, verdict
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.charts import Chart
from lcmdistill.report.curves import against_steps, full_steps_level, good
from lcmdistill.report.page import chart_cards, metric_rows, preview, render_page, run_description, steps_text, table
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError

STYLES = (0, 3, 4, 5, 2)
"the line styles of the runs, in their order"

SHARED = {
    "preview_prompts": "prompts",
    "seed": "seed",
    "images": "num_images",
    "resolution": "resolution",
    "sizes": "buckets",
}
"what compared evaluations must have in common, and its name for messages"


def comparison(runs: Sequence[Path]) -> dict[str, Any]:
    """Return the template's variables.

    Raises:
        UsageError: A run was not evaluated, or on other prompts or noise.
    """
    evaluated: dict[str, Results] = {}
    for run in runs:
        results = read_results(run)
        if results is None:
            raise UsageError(f"{run} has not been evaluated; run: lcmdistill evaluate {run}")
        evaluated[_distinct_name(run, evaluated)] = results
    first = next(iter(evaluated.values()))
    for key, name in SHARED.items():
        if any((results.info.get(key) or None) != (first.info.get(key) or None) for results in evaluated.values()):
            raise UsageError(
                f"the runs were evaluated with different {name}; evaluate them together: lcmdistill evaluate RUN1 RUN2"
            )
    rows = []
    for run, (name, results) in zip(runs, evaluated.items(), strict=True):
        judged = verdict(results)
        chosen = judged.enough or results.steps[-1]
        time = results.seconds("student", chosen)
        rows.append(
            {
                "name": name,
                "description": run_description(require_run_config(run)),
                "headline": judged.headline,
                "guidance": f"{results.guidance_scale:g}",
                "time": "" if time is None else f"{seconds(time)} at {steps_text(chosen)}",
            }
        )
    held_out = "held-out " if first.info["held_out"] else ""
    return {
        "title": " and ".join(evaluated) if len(evaluated) == 2 else f"{len(evaluated)} runs",
        "about": (
            f"{first.info['images']} images per row, from the same {held_out}prompts and the same start noise "
            f"(seed {first.info['seed']})."
        ),
        "rows": rows,
        "groups": [_group(evaluated, i) for i in range(len(first.info["preview_prompts"]))],
        "heads": [*map(steps_text, first.steps), f"teacher, {TEACHER_STEPS} steps"],
        "charts": chart_cards(_charts(evaluated)),
        "tables": [
            {**table(results), "caption": f"{name}: {table(results)['caption']}"} for name, results in evaluated.items()
        ],
        "metrics": metric_rows(first),
    }


def _distinct_name(run: Path, others: Collection[str]) -> str:
    """Return a run's name, with as many of its folders as it takes to distinguish it from others."""
    parts = run.resolve().parts
    names = ("/".join(parts[i:]) for i in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name not in others), str(run))


def _group(evaluated: dict[str, Results], index: int) -> dict[str, Any]:
    """Return the images of one prompt, one row per run."""
    first = next(iter(evaluated.values()))
    rows = []
    for name, results in evaluated.items():
        scale = results.guidance_scale
        pictures = [preview(results, "student", n, scale, index, name) for n in first.steps]
        pictures.append(preview(results, "teacher", TEACHER_STEPS, scale, index, f"teacher of {name}"))
        rows.append({"name": f"{name}, guidance {scale:g}", "pictures": pictures})
    return {"prompt": first.info["preview_prompts"][index], "rows": rows}


def _charts(evaluated: dict[str, Results]) -> list[Chart]:
    """Return a chart of each metric that all runs have: one line per run, and the first run's teacher."""
    first, charts = next(iter(evaluated.values())), []
    for name, metric in first.metrics.items():
        if not all(name in results.metrics for results in evaluated.values()):
            continue
        series = [
            against_steps(results, name, "student", run, STYLES[i % len(STYLES)])
            for i, (run, results) in enumerate(evaluated.items())
        ]
        series.append(against_steps(first, name, "teacher", "teacher, same steps", 1))
        about = f"{metric['description']} {good(metric['better'])}"
        levels = full_steps_level(first, name)
        charts.append(Chart(metric["label"], "steps", metric["label"], tuple(series), levels, about, log2_x=True))
    return [chart for chart in charts if not chart.is_empty]


def write_comparison(runs: Sequence[Path], output: Path) -> Path:
    """Write a page that compares evaluated runs, and return its path."""
    write_text(output, render_page("comparison.html", comparison(runs)))
    return output
