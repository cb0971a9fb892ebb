"""`lcmdistill report`: what a run was, learnt and draws, on one page that needs nothing from outside.

The page is RUN/report.html, made of what lies in the run's folder: its settings, metrics.jsonl, samples/, and evaluation/ where
the run was evaluated.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, settings_to_toml
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.sweep import Sampler
from lcmdistill.evaluation.verdict import Verdict, seconds, verdict
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.charts import Chart, short, to_svg
from lcmdistill.report.curves import consistency_charts, good, quality_charts, training_charts
from lcmdistill.report.guidance import guidance_note
from lcmdistill.report.pictures import Picture, embedded, validation_grids
from lcmdistill.report.uses import uses
from lcmdistill.teachers.naming import public_name, redact_paths
from lcmdistill.training.best import best_checkpoint_advice, history, quality_warning
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.metrics_log import read_metrics

HERO_ROWS = 3
"prompts beside the verdict"

SAMPLERS = {"student": "student", "teacher": "teacher", "trailing": "teacher, from full noise"}


def write_report(run: Path) -> Path:
    """Write RUN/report.html; returns its path. Raises UsageError if the folder is no run."""
    config = require_run_config(run)
    path = run / "report.html"
    write_text(path, render_page("report.html", context(run, config)))
    return path


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """A page of one file, from one of the templates in assets/report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(str(files("lcmdistill") / "assets" / "report"))
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    look = {name: Markup((folder / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return environment.get_template(template).render(**look, **values) + "\n"


def evaluation_summary(run: Path) -> str:
    """What an evaluation found, in a few plain lines. Raises UsageError if there was none."""
    results = read_results(run)
    if results is None:
        raise UsageError(f"{run} has not been evaluated; run: lcmdistill evaluate {run}")
    judged = verdict(results)
    return "\n".join([f"{run.name}: {judged.headline}", *(f"  {reason}" for reason in judged.reasons)])


def context(run: Path, config: RunConfig) -> dict[str, Any]:
    """All that the page of a run shows."""
    results, lines = read_results(run), read_metrics(run)
    judged = verdict(results) if results else None
    charts = training_charts(lines)
    quality = {} if results is None else _quality(results)
    cards = evaluation_rows(quality.get("charts", []), charts)
    values: dict[str, Any] = {
        "name": run.name,
        "folder": quote(str(run)),
        "what": run_description(config),
        "verdict": judged,
        "warnings": _warnings(run, config, results),
        "hero": _hero(results, judged) if results and judged else None,
        "matrix": matrix(results, judged, omega_range(config) is None) if results and judged else None,
        "quality": {**quality, "charts": cards[: len(quality["charts"])]} if results else None,
        "times": _times(results) if results else None,
        "training": {"about": _training_about(config, lines), "charts": cards[len(quality.get("charts", [])) :]}
        if charts
        else None,
        "grids": validation_grids(run / "samples"),
        "uses": uses(run, config, judged.enough if judged and judged.enough else 4),
        "made": configuration_rows(config),
        "settings": settings_to_toml(redact_paths(flatten(config))).strip(),
    }
    titles = {"matrix": ("steps", "Steps and guidance"), "quality": ("quality", "How good"), "times": ("time", "Time")}
    titles |= {"training": ("training", "Training"), "grids": ("validation", "Validation")}
    values["sections"] = [title for key, title in titles.items() if values[key]]
    values["sections"] += [("use", "Use it"), ("made", "What it is made of")]
    return values


def _warnings(run: Path, config: RunConfig, results: Results | None) -> list[str]:
    """What a run's validations give reason to say, and an evaluation that is older than the run."""
    metric = config.run.best_metric
    values = history(run, metric)
    said = [quality_warning(metric, values) if values else None, best_checkpoint_advice(run, metric)]
    if results and not results.is_of(config):
        said.append(
            f"what this page measures was drawn after {results.about['trained_steps']} training steps, and the run was taken "
            f"to {config.optim.max_train_steps} since; measure it anew: lcmdistill evaluate {quote(str(run))}"
        )
    return [f"{text[0].upper()}{text[1:]}." for text in said if text]


def evaluation_rows(*groups: list[Chart]) -> list[dict[str, Any]]:
    """Charts with their SVGs, numbered through the page."""
    from markupsafe import Markup

    charts = [chart for group in groups for chart in group]
    return [{"chart": chart, "svg": Markup(to_svg(chart, i))} for i, chart in enumerate(charts)]


def run_description(config: RunConfig) -> str:
    """One sentence: what was distilled from what."""
    kind, method = "A LoRA" if config.student.kind == "lora" else "A full student", config.objective.info
    size = config.optim.batch_size * config.optim.gradient_accumulation_steps
    return (
        f"{kind}, {method.relation} the teacher {public_name(config.teacher.model)} by {config.objective_name.upper()} in "
        f"{config.optim.max_train_steps} steps of {size} samples at {config.data.resolution} px."
    )


def configuration_rows(config: RunConfig) -> list[tuple[str, str]]:
    """The settings that a reader asks for first."""
    omegas = omega_range(config)
    found = [
        ("Teacher", public_name(config.teacher.model)),
        ("Student", _student(config)),
        ("Objective", f"{config.objective_name}, {config.objective.info.describe(config.objective)}"),
        ("Data", ", ".join(config.data.sources)),
        ("Optimiser", f"AdamW, learning rate {short(config.optim.learning_rate)}, {config.optim.lr_scheduler}"),
        (
            "Length",
            f"{config.optim.max_train_steps} steps of {config.optim.batch_size} x "
            f"{config.optim.gradient_accumulation_steps} samples",
        ),
        ("Seed", str(config.run.seed)),
    ]
    if omegas is not None:
        found.insert(3, ("Guidance", f"guidance scale {omegas.scale} in diffusers' convention (omega is one less)"))
    return found


def _student(config: RunConfig) -> str:
    if config.student.kind == "lora":
        return f"LoRA of rank {config.student.rank}, alpha {config.student.alpha:g}, target {config.student.target}"
    return f"full network, target {config.student.target}"


def _training_about(config: RunConfig, lines: list[dict[str, Any]]) -> str:
    trained = [line for line in lines if "loss" in line]
    size = config.optim.batch_size * config.optim.gradient_accumulation_steps
    return (
        f"{trained[-1]['step']} steps of {size} samples a process, logged every {config.run.log_every}."
        if trained
        else ""
    )


def picture_of(results: Results, sampler: Any, steps: int, scale: float, place: int, who: str) -> Picture | None:
    paths = results.pictures(sampler, steps, scale)
    if place >= len(paths):
        return None
    prompt = results.about["pictured_prompts"][place]
    return embedded(paths[place], f"{prompt}: {who}, {steps} step{'s' * (steps > 1)}, guidance {scale:g}")


def _hero(results: Results, judged: Verdict) -> dict[str, Any]:
    """The student at each number of steps with its grade, and the teacher's full steps beside it."""
    scale = results.guidance_scale
    heads: list[dict[str, Any]] = [
        {"text": f"{n} step{'s' * (n > 1)}", "grade": judged.enough and judged.grades[n]} for n in results.steps
    ]
    heads.append({"text": f"teacher, {TEACHER_STEPS}", "grade": None})
    rows = []
    for place, prompt in list(enumerate(results.about["pictured_prompts"]))[:HERO_ROWS]:
        pictures = [picture_of(results, "student", n, scale, place, "student") for n in results.steps]
        pictures.append(picture_of(results, "teacher", TEACHER_STEPS, scale, place, "teacher"))
        rows.append({"prompt": prompt, "pictures": pictures})
    return {"heads": heads, "rows": rows}


def matrix(results: Results, judged: Verdict, is_free: bool) -> dict[str, Any]:
    """For each pictured prompt: rows of guidance scales, columns of steps, the teacher's rows. is_free: whether CFG acts."""
    heads = [f"{n} step{'s' * (n > 1)}" for n in results.steps] + [f"teacher, {TEACHER_STEPS} steps"]
    groups = []
    for place, prompt in enumerate(results.about["pictured_prompts"]):
        rows = []
        for scale in sorted(results.about["guidance_scales"]):
            pictures = [picture_of(results, "student", n, scale, place, "student") for n in results.steps]
            pictures.append(picture_of(results, "teacher", TEACHER_STEPS, scale, place, "teacher"))
            rows.append({"name": f"guidance {scale:g}", "pictures": pictures})
        scale = results.guidance_scale
        for sampler in ("teacher", "trailing"):
            pictures = [picture_of(results, sampler, n, scale, place, SAMPLERS[sampler]) for n in results.steps]
            if any(pictures):
                rows.append({"name": f"{SAMPLERS[sampler]}, guidance {scale:g}", "pictures": [*pictures, None]})
        groups.append({"prompt": prompt, "rows": rows})
    where = "Guidance is an input of the student and costs nothing."
    where = "Guidance acts when it draws, at twice the cost." if is_free else where
    if results.about["is_baked"]:
        where = "Its guidance is in its weights, so there is one row of it." if results.about["held_out"] else ""
    trails = any(cell["sampler"] == "trailing" for cell in results.cells.values())
    placed = ": as its own scheduler places them, and from full noise, where the student starts" if trails else ""
    about = (
        f"Columns are steps, rows guidance scales; in the last column the teacher at its full {TEACHER_STEPS} steps with the "
        f"same guidance. {where} Below them the teacher itself with as few steps{placed}."
    )
    return {
        "heads": heads,
        "groups": groups,
        "about": about,
        "note": guidance_note(results, judged.enough or results.steps[-1]),
    }


def _quality(results: Results) -> dict[str, Any]:
    measures = results.about["measures"]
    count, whence = results.about["distinct_prompts"], ""
    if results.about["held_out"]:
        whence = f" of {count} prompts that were held out of training,"
    elif results.about.get("has_classes"):
        whence = f" of {count} classes,"
    about = (
        f"{results.about['images']} images in each cell,{whence} all from the same start noise (seed {results.about['seed']}), "
        f"guidance scale {results.guidance_scale:g}. None of these numbers compares with a published one unless its row "
        "says so."
    )
    charts = [*quality_charts(results), *consistency_charts(results)]
    meanings = [{**about, "good": good(about["better"])} for about in measures.values()]
    return {"about": about, "charts": charts, "table": table(results), "meanings": meanings}


def table(results: Results) -> dict[str, Any]:
    """Every number of a sweep: a row a cell, a column a measure."""
    measures = results.about["measures"]
    rows = []
    for cell in results.cells.values():
        evaluation_rows = f"{SAMPLERS[cell['sampler']]}, {cell['steps']} step{'s' * (cell['steps'] > 1)}"
        name = f"{evaluation_rows}, guidance {cell['guidance_scale']:g}"
        cells = [{"text": _number(cell["numbers"].get(key)), "best": False} for key in measures]
        rows.append({"name": name, "cells": cells})
    caption = f"All numbers, of {results.about['images']} images a row"
    return {"caption": caption, "heads": ["drawn by", *[about["label"] for about in measures.values()]], "rows": rows}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _times(results: Results) -> dict[str, Any] | None:
    full = results.seconds("teacher", TEACHER_STEPS)
    rows = []
    drawers: list[tuple[Sampler, int]] = [
        *(("student", n) for n in results.steps),
        *(("teacher", n) for n in (*results.steps, TEACHER_STEPS)),
    ]
    drawers = [drawer for drawer in drawers if results.seconds(*drawer) is not None]
    hows = sorted({results.how(*drawer) for drawer in drawers})
    for sampler, n in drawers:
        value = results.seconds(sampler, n) or 0.0
        ratio = f"{full / value:.{0 if full >= 10 * value else 1}f} times" if full and value else ""
        cells = [{"text": seconds(value), "best": False}, {"text": ratio, "best": False}]
        name = f"{sampler}, {n} step{'s' * (n > 1)}"
        rows.append({"name": name if len(hows) == 1 else f"{name}, in {results.how(sampler, n)}", "cells": cells})
    how = f"in {hows[0]}" if len(hows) == 1 else "not all in the same way"
    caption = (
        f"Network and scheduler alone, without decoding, {how}, taken while the images of the sweep were drawn: whatever else "
        "the machine did is in it"
    )
    return {
        "caption": caption,
        "heads": ["drawn by", "an image", f"faster than the teacher's {TEACHER_STEPS}"],
        "rows": rows,
    }
