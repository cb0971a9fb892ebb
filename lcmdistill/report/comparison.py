"""The page that compares several runs, evaluated on the same prompts and noise."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import RunConfig
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.verdict import Verdict, seconds, verdict
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.charts import Chart
from lcmdistill.report.curves import against_steps, full_steps_level, good
from lcmdistill.report.downloads import downloads
from lcmdistill.report.page import chart_cards, metric_rows, preview, render_page, run_description, steps_text, table
from lcmdistill.report.ranking import (
    Ranking,
    differing_settings,
    metric_columns,
    rank,
    short_settings,
    use_commands,
)
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


def evaluated_runs(runs: Sequence[Path]) -> dict[str, Results]:
    """Return the results of several runs by their names.

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
    return evaluated


def comparison(runs: Sequence[Path], rank_by: str | None = None) -> dict[str, Any]:
    """Return the template's variables.

    Args:
        runs: The run folders.
        rank_by: METRIC or METRIC@STEPS; None is the default.

    Raises:
        UsageError: The runs cannot be compared, or not ranked by that metric.
    """
    evaluated = evaluated_runs(runs)
    results, configs = list(evaluated.values()), [require_run_config(run) for run in runs]
    verdicts = [verdict(each) for each in results]
    ranking, first = rank(results, verdicts, rank_by), results[0]
    best = ranking.order[0]
    held_out = "held-out " if first.info["held_out"] else ""
    return {
        "ranking": _ranking_table(list(evaluated), results, verdicts, configs, ranking),
        "facts": [
            f"{list(evaluated)[best]} is the best of {len(runs)} by {ranking.text} ({ranking.values[best]:g})."
            if ranking.values[best] is not None
            else f"No run has a number for {ranking.text}.",
            verdicts[best].headline,
        ],
        "use": use_commands(runs[best], verdicts[best], results[best]),
        "best": list(evaluated)[best],
        "runs": [
            {"name": name, "headline": judged.headline, "description": run_description(config)}
            for name, judged, config in zip(evaluated, verdicts, configs, strict=True)
        ],
        "title": " and ".join(evaluated) if len(evaluated) == 2 else f"{len(evaluated)} runs",
        "about": (
            f"{first.info['images']} images per row, from the same {held_out}prompts and the same start noise "
            f"(seed {first.info['seed']}). {first.protocol}".rstrip()
        ),
        "groups": [_group(evaluated, i) for i in range(len(first.info["preview_prompts"]))],
        "heads": [*map(steps_text, first.steps), f"teacher, {TEACHER_STEPS} steps"],
        "charts": chart_cards(_charts(evaluated)),
        "files": downloads(evaluated, "comparison"),
        "tables": [
            {**table(results), "caption": f"{name}: {table(results)['caption']}"} for name, results in evaluated.items()
        ],
        "metrics": metric_rows(first),
    }


def _ranking_table(
    names: Sequence[str],
    results: Sequence[Results],
    verdicts: Sequence[Verdict],
    configs: Sequence[RunConfig],
    ranking: Ranking,
) -> dict[str, Any]:
    """Return the table of the runs, the best first: the settings that differ, every metric, and the time per image."""
    settings, columns = differing_settings(configs), metric_columns(results, ranking.steps)
    times = [each.seconds("student", ranking.steps) for each in results]
    rows = [
        {
            "name": names[i],
            "settings": [values[i] for _, values in settings],
            "numbers": [
                ("" if values[i] is None else f"{values[i]:g}", metric == ranking.metric)
                for metric, values in columns.items()
            ],
            "time": "" if times[i] is None else seconds(times[i] or 0.0),
            "time_value": times[i],
            "enough": str(verdicts[i].enough or ("none" if not verdicts[i].usable else "")),
        }
        for i in ranking.order
    ]
    return {
        "caption": f"The runs by {ranking.text}, the best first, with the settings that differ",
        "settings": short_settings(settings),
        "metrics": [results[0].metrics[metric]["label"] for metric in columns],
        "rows": rows,
    }


def ranking_text(runs: Sequence[Path], rank_by: str | None = None) -> str:
    """Return the runs in the order of a metric, one per line, with the settings that differ."""
    evaluated = evaluated_runs(runs)
    results = list(evaluated.values())
    ranking = rank(results, [verdict(each) for each in results], rank_by)
    settings, names = differing_settings([require_run_config(run) for run in runs]), list(evaluated)
    heads, lines = short_settings(settings), [f"by {ranking.text}:"]
    for place, i in enumerate(ranking.order, start=1):
        value = "no number" if ranking.values[i] is None else f"{ranking.values[i]:g}"
        own = [f"{head} {values[i]}" for head, (_, values) in zip(heads, settings, strict=True)]
        lines.append(f"  {place}. {names[i]}: {value} ({', '.join(own) or 'no setting differs'})")
    return "\n".join(lines)


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


def write_comparison(runs: Sequence[Path], output: Path, rank_by: str | None = None) -> Path:
    """Write a page that compares evaluated runs, and return its path. rank_by: as `comparison`."""
    write_text(output, render_page("comparison.html", comparison(runs, rank_by)))
    return output
