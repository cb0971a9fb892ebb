"""The page of several runs side by side, all drawn from the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.verdict import seconds, verdict
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.charts import Chart, Series
from lcmdistill.report.curves import good
from lcmdistill.report.page import evaluation_rows, picture_of, render_page, run_description, table
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError

LOOKS = (0, 3, 4, 5, 2)
"of the runs' lines, in their order"


def comparison(runs: Sequence[Path]) -> dict[str, Any]:
    """All that the page shows. Raises UsageError for runs that were not evaluated on the same prompts and noise."""
    found: dict[str, Results] = {}
    for run in runs:
        results = read_results(run)
        if results is None:
            raise UsageError(f"{run} has not been evaluated; run: lcmdistill evaluate {run}")
        found[run.name if run.name not in found else str(run)] = results
    first = next(iter(found.values()))
    for key in ("pictured_prompts", "seed", "images", "resolution"):
        if any(results.about[key] != first.about[key] for results in found.values()):
            raise UsageError(
                f"the runs were evaluated with other {key}; evaluate them together: lcmdistill evaluate RUN1 RUN2"
            )
    rows = []
    for run, (name, results) in zip(runs, found.items(), strict=True):
        judged = verdict(results)
        chosen = judged.enough or results.steps[-1]
        taken = results.seconds("student", chosen)
        rows.append(
            {
                "name": name,
                "what": run_description(require_run_config(run)),
                "headline": judged.headline,
                "guidance": f"{results.guidance_scale:g}",
                "time": "" if taken is None else f"{seconds(taken)} at {chosen} step{'s' * (chosen > 1)}",
            }
        )
    return {
        "title": " and ".join(found) if len(found) == 2 else f"{len(found)} runs",
        "about": (
            f"{first.about['images']} images in each cell, from the same {'held-out ' * first.about['held_out']}prompts and "
            f"the same start noise (seed {first.about['seed']})."
        ),
        "rows": rows,
        "groups": [_group(found, place) for place in range(len(first.about["pictured_prompts"]))],
        "steps": first.steps,
        "heads": [f"{n} step{'s' * (n > 1)}" for n in first.steps] + [f"teacher, {TEACHER_STEPS} steps"],
        "charts": evaluation_rows(_charts(found)),
        "tables": [
            {**table(results), "caption": f"{name}: {table(results)['caption']}"} for name, results in found.items()
        ],
        "meanings": [{**about, "good": good(about["better"])} for about in first.about["measures"].values()],
    }


def _group(found: dict[str, Results], place: int) -> dict[str, Any]:
    """One prompt: a row a run."""
    first = next(iter(found.values()))
    rows = []
    for name, results in found.items():
        scale = results.guidance_scale
        pictures = [picture_of(results, "student", n, scale, place, name) for n in first.steps]
        pictures.append(picture_of(results, "teacher", TEACHER_STEPS, scale, place, f"teacher of {name}"))
        rows.append({"name": f"{name}, guidance {scale:g}", "pictures": pictures})
    return {"prompt": first.about["pictured_prompts"][place], "rows": rows}


def _charts(found: dict[str, Results]) -> list[Chart]:
    """A chart of each measure that all runs have: a line a run, and the teacher of the first."""
    first, charts = next(iter(found.values())), []
    for measure, about in first.about["measures"].items():
        if not all(measure in results.about["measures"] for results in found.values()):
            continue
        series = [
            _line(results, measure, "student", name, LOOKS[i % len(LOOKS)])
            for i, (name, results) in enumerate(found.items())
        ]
        series.append(_line(first, measure, "teacher", "teacher, as few steps", 1))
        full = first.full(measure)
        has_level = full is not None and measure not in ("rmse", "ssim")
        levels = ((f"teacher, {TEACHER_STEPS} steps", full),) if full is not None and has_level else ()
        said = f"{about['about']} {good(about['better'])}"
        charts.append(Chart(about["label"], "steps", about["label"], tuple(series), levels, said, doubling=True))
    return [chart for chart in charts if not chart.is_empty]


def _line(results: Results, measure: str, sampler: Any, name: str, look: int) -> Series:
    values = [(float(n), results.number(measure, sampler, n)) for n in results.steps]
    return Series(name, tuple((n, v) for n, v in values if v is not None), look)


def write_comparison(runs: Sequence[Path], output: Path) -> Path:
    """Write a page that shows evaluated runs side by side; returns its path."""
    write_text(output, render_page("comparison.html", comparison(runs)))
    return output
