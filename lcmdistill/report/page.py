"""`lcmdistill report`: one self-contained page with a run's configuration, training, samples and evaluation.

The page is RUN/report.html. It shows the content of the run folder: config.toml, metrics.jsonl, samples/, and evaluation/ if
the run was evaluated.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.lora_words import with_loras
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, settings_to_toml
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.scorers.registry import SCORERS
from lcmdistill.evaluation.sweep import Sampler
from lcmdistill.evaluation.verdict import Verdict, seconds, verdict
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.charts import Chart, short, to_svg
from lcmdistill.report.curves import consistency_charts, good, quality_charts, training_charts
from lcmdistill.report.downloads import downloads
from lcmdistill.report.expected import expected_loss
from lcmdistill.report.guidance import guidance_note
from lcmdistill.report.pictures import Picture, embedded, validation_grids
from lcmdistill.report.uses import uses
from lcmdistill.teachers.naming import public_name, public_path, redact_paths
from lcmdistill.training.best import best_checkpoint_advice, compared_with_untrained, history, quality_warning
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.metrics_log import missing_metrics, read_metrics
from lcmdistill.utils.redact import public_word
from lcmdistill.utils.run_dir import checkpoint_step, checkpoints

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

SUMMARY_ROWS = 3
"prompts in the summary"

SAMPLERS = {"student": "student", "teacher": "teacher", "trailing": "teacher, trailing timesteps"}

SECTIONS = {
    "matrix": "Steps and guidance",
    "quality": "Quality by steps",
    "times": "Time per image",
    "training": "Training",
    "validation": "Validation during training",
    "use": "Usage",
    "configuration": "Configuration",
}
"the sections of the page: their ids and their titles, in the navigation and as headings"


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path.

    Raises:
        UsageError: The folder is not a run.
    """
    config = require_run_config(run)
    path = run / "report.html"
    write_text(path, render_page("report.html", context(run, config)))
    return path


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Return a self-contained page.

    Args:
        template: The name of a template in assets/report.
        values: The template's variables.
    """
    return _templates().get_template(template).render(**values) + "\n"


@cache
def _templates() -> "Environment":
    """Return the page templates, which share the style and the script of every page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(str(files("lcmdistill") / "assets" / "report"))
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    parts = {"css": "page.css", "js": "page.js", "watch_js": "watch.js"}
    environment.globals |= {name: Markup((folder / file).read_text(encoding="utf-8")) for name, file in parts.items()}
    return environment


def evaluation_summary(run: Path) -> str:
    """Return the verdict of a run's evaluation in a few lines.

    Raises:
        UsageError: The run was not evaluated.
    """
    results = read_results(run)
    if results is None:
        raise UsageError(f"{run} has not been evaluated; run: lcmdistill evaluate {run}")
    judged = verdict(results)
    lines = [*judged.reasons, *score_lines(results, judged.enough or results.steps[-1]), results.protocol]
    return "\n".join([f"{run.name}: {judged.headline}", *(f"  {line}" for line in lines if line)])


def score_lines(results: Results, steps: int) -> list[str]:
    """Return what the scorers found at a number of steps and of the teacher, with what they cannot see."""
    lines = []
    for name, metric in results.metrics.items():
        value, full = results.number(name, "student", steps), results.full(name)
        if name not in SCORERS or value is None:
            continue
        number = _number_text(value, results.error(name, "student", steps))
        teacher = "" if full is None else f", and the teacher at {TEACHER_STEPS} steps {full:g}"
        lines.append(
            f"{metric['label']} at {steps_text(steps)}: {number}{teacher}. {metric.get('limits', '')}".rstrip()
        )
    return lines


def context(run: Path, config: RunConfig) -> dict[str, Any]:
    """Return the template's variables for a run's page."""
    results, lines = read_results(run), read_metrics(run)
    saved = checkpoints(run / "checkpoints")
    for sentence in missing_metrics(run, checkpoint_step(saved[-1]) if saved else 0, config.run.log_every):
        logger.warning(sentence)
    judged = verdict(results) if results else None
    quality = [*quality_charts(results), *consistency_charts(results)] if results else []
    training = training_charts(lines, expected_loss(config))
    cards = chart_cards([*quality, *training])
    values: dict[str, Any] = {
        "name": run.name,
        "folder": quote(public_path(run)),
        "description": run_description(config),
        "verdict": judged,
        "warnings": _warnings(run, config, results),
        "summary": _summary_images(results, judged) if results and judged else None,
        "matrix": matrix(results, judged, omega_range(config) is None) if results and judged else None,
        "quality": _quality(run.name, results, cards[: len(quality)]) if results else None,
        "times": _times(results) if results else None,
        "training": {"about": _training_about(run, config, lines), "charts": cards[len(quality) :]}
        if training
        else None,
        "validation": validation_grids(run / "samples", _validated(lines)),
        "use": uses(run, config, judged.enough if judged and judged.enough else None),
        "configuration": configuration_rows(config),
        "settings": settings_to_toml(redact_paths(flatten(config))).strip(),
        "titles": SECTIONS,
        "watch": "",  # the version of a page that is served and reloads itself
    }
    values["sections"] = [(name, title) for name, title in SECTIONS.items() if values[name]]
    return values


def _validated(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(line["step"]) for line in lines if any(key.startswith("val/") for key in line)]


def _warnings(run: Path, config: RunConfig, results: Results | None) -> list[str]:
    """Return warnings about the validations, and about an evaluation that is older than the run."""
    metric = config.run.best_metric
    values = history(run, metric)
    warnings = [quality_warning(metric, values) if values else None, best_checkpoint_advice(run, metric)]
    if results and not results.is_current(config):
        warnings.append(
            f"this evaluation is of training step {results.info['trained_steps']}, and the run has continued to step "
            f"{config.optim.max_train_steps}; evaluate it again: lcmdistill evaluate {quote(public_path(run))}"
        )
    return [f"{text[0].upper()}{text[1:]}." for text in warnings if text]


def chart_cards(charts: list[Chart]) -> list[dict[str, Any]]:
    """Return charts with their SVGs, numbered for unique ids on the page."""
    from markupsafe import Markup

    return [{"chart": chart, "svg": Markup(to_svg(chart, i))} for i, chart in enumerate(charts)]


def run_description(config: RunConfig) -> str:
    """Return one sentence: what was trained, by which method, from which teacher."""
    kind = "A LoRA" if config.student.kind == "lora" else "A full student"
    size = config.optim.batch_size * config.optim.gradient_accumulation_steps
    teacher = with_loras(public_name(config.teacher.model), config.teacher.loras)
    return (
        f"{kind}, {config.objective.info.relation} the teacher {teacher} with "
        f"{config.objective_name.upper()} in {config.optim.max_train_steps} steps of {size} samples at "
        f"{config.data.resolution} px."
    )


def configuration_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Return the most important settings as (label, value)."""
    omegas = omega_range(config)
    rows = [
        ("Teacher", with_loras(public_name(config.teacher.model), config.teacher.loras)),
        ("Student", _student(config)),
        ("Objective", f"{config.objective_name}, {config.objective.info.describe(config.objective)}"),
        ("Data", ", ".join(map(public_word, config.data.sources))),
        ("Optimizer", f"AdamW, learning rate {short(config.optim.learning_rate)}, {config.optim.lr_scheduler}"),
        (
            "Length",
            f"{config.optim.max_train_steps} steps of {config.optim.batch_size} x "
            f"{config.optim.gradient_accumulation_steps} samples",
        ),
        ("Seed", str(config.run.seed)),
    ]
    if omegas is not None:
        rows.insert(3, ("Guidance", f"guidance scale {omegas.scale} in diffusers' convention (omega + 1)"))
    return rows


def _student(config: RunConfig) -> str:
    if config.student.kind == "lora":
        return f"LoRA of rank {config.student.rank}, alpha {config.student.alpha:g}, target {config.student.target}"
    return f"full network, target {config.student.target}"


def _training_about(run: Path, config: RunConfig, lines: list[dict[str, Any]]) -> str:
    trained = [line for line in lines if "loss" in line]
    size = config.optim.batch_size * config.optim.gradient_accumulation_steps
    if not trained:
        return ""
    comparison = compared_with_untrained(config.run.best_metric, history(run, config.run.best_metric))
    more = f" In validation, the student is {comparison}." if comparison else ""
    return (
        f"{trained[-1]['step']} steps of {size} samples per process, logged every {config.run.log_every} steps.{more}"
    )


def steps_text(n: int) -> str:
    """Return "1 step" or "4 steps"."""
    return f"{n} step{'s' * (n > 1)}"


def preview(results: Results, sampler: Sampler, steps: int, scale: float, index: int, name: str) -> Picture | None:
    """Return a preview image of a sweep point; None if there is none.

    Args:
        results: The results of a run.
        sampler: What generated the image.
        steps: The number of sampling steps.
        scale: The guidance scale.
        index: The index of the prompt among the previewed ones.
        name: The sampler's name in the image's description.
    """
    paths = results.previews(sampler, steps, scale)
    if index >= len(paths) or (path := paths[index]) is None:
        return None
    prompt = results.info["preview_prompts"][index]
    return embedded(path, f"{prompt}: {name}, {steps_text(steps)}, guidance {scale:g}")


def _row(results: Results, scale: float, index: int) -> list[Picture | None]:
    """Return the student's images at each number of steps, and the teacher's at full steps."""
    pictures = [preview(results, "student", n, scale, index, "student") for n in results.steps]
    return [*pictures, preview(results, "teacher", TEACHER_STEPS, scale, index, "teacher")]


def _summary_images(results: Results, judged: Verdict) -> dict[str, Any]:
    """Return the student's images at each number of steps with their grade, next to the teacher's."""
    heads: list[dict[str, Any]] = [
        {"text": steps_text(n), "grade": judged.grades[n] if judged.enough or not judged.usable else None}
        for n in results.steps
    ]
    heads.append({"text": f"teacher, {TEACHER_STEPS}", "grade": None})
    prompts = results.info["preview_prompts"][:SUMMARY_ROWS]
    rows = [
        {"prompt": prompt, "pictures": _row(results, results.guidance_scale, i)} for i, prompt in enumerate(prompts)
    ]
    return {"heads": heads, "rows": rows}


def matrix(results: Results, judged: Verdict, is_free: bool) -> dict[str, Any]:
    """Return the images of every guidance scale (rows) and number of steps (columns), for each previewed prompt.

    Args:
        results: The results of a run.
        judged: Its verdict.
        is_free: Whether CFG acts on the student.
    """
    scale, groups = results.guidance_scale, []
    for i, prompt in enumerate(results.info["preview_prompts"]):
        rows = [
            {"name": f"guidance {each:g}", "pictures": _row(results, each, i)}
            for each in sorted(results.info["guidance_scales"])
        ]
        for sampler in ("teacher", "trailing"):
            pictures = [preview(results, sampler, n, scale, i, SAMPLERS[sampler]) for n in results.steps]
            if any(pictures):
                rows.append({"name": f"{SAMPLERS[sampler]}, guidance {scale:g}", "pictures": [*pictures, None]})
        groups.append({"prompt": prompt, "rows": rows})
    if results.info["is_baked"]:
        has_prompts = results.info.get("prompts_origin", results.info["held_out"])
        cost = " The student's guidance is in its weights, so there is one row." if has_prompts else ""
    elif is_free:
        cost = " CFG acts on the student and doubles its cost."
    else:
        cost = " Guidance is an input of the student and adds no cost."
    has_trailing = any(point["sampler"] == "trailing" for point in results.points.values())
    schedulers = ", with its own scheduler and with trailing timesteps" if has_trailing else ""
    about = (
        f"Columns are step counts, rows are guidance scales. The last column is the teacher at its full {TEACHER_STEPS} steps "
        f"with the same guidance.{cost} Below: the teacher with the same few steps{schedulers}."
    )
    return {
        "heads": [*map(steps_text, results.steps), f"teacher, {TEACHER_STEPS} steps"],
        "groups": groups,
        "about": about,
        "note": guidance_note(results, judged.enough or results.steps[-1]),
    }


def _quality(name: str, results: Results, cards: list[dict[str, Any]]) -> dict[str, Any]:
    info = results.info
    source = ""
    if info.get("prompts_origin"):
        kind = "captions" if "own data" in info["prompts_origin"] else "prompts"
        source = f" of {info['distinct_prompts']} {kind} {info['prompts_origin']}"
    elif info["held_out"]:
        source = f" of {info['distinct_prompts']} prompts that were held out of training"
    elif info.get("has_classes"):
        source = f" of {info['distinct_prompts']} classes"
    notes = "".join(f" {note}" for note in info.get("notes", ()))
    eta = f", eta {info['eta']:g}" if "eta" in info else ""
    sizes = f" Image sizes (height x width): {', '.join(info['sizes'])}." if info.get("sizes") else ""
    about = (
        f"{info['images']} images per row{source}, from the same start noise (seed {info['seed']}), at guidance scale "
        f"{results.guidance_scale:g}{eta}.{sizes}{notes} These numbers are not comparable with published results unless stated."
    )
    files = downloads({name: results}, name)
    return {
        "about": about,
        "protocol": results.protocol,
        "charts": cards,
        "files": files,
        "table": table(results),
        "metrics": metric_rows(results),
    }


def metric_rows(results: Results) -> list[dict[str, Any]]:
    """Return the metrics' descriptions for the table of metrics."""
    return [{"limits": "", **metric, "good": good(metric["better"])} for metric in results.metrics.values()]


def table(results: Results) -> dict[str, Any]:
    """Return every number of a sweep: one row per point, one column per metric."""
    rows = []
    for point in results.points.values():
        name = f"{SAMPLERS[point['sampler']]}, {steps_text(point['steps'])}, guidance {point['guidance_scale']:g}"
        rows.append({"name": name, "cells": [_with_error(point, key) for key in results.metrics]})
    return {
        "caption": f"All numbers ({results.info['images']} images per row)",
        "heads": ["Sampler", *[metric["label"] for metric in results.metrics.values()]],
        "rows": rows,
    }


def _with_error(point: Mapping[str, Any], metric: str) -> str:
    """Return a number with its standard error, if it has one; "" without a number."""
    value, error = point["numbers"].get(metric), point.get("standard_errors", {}).get(metric)
    return "" if value is None else _number_text(value, error)


def _number_text(value: float, error: float | None) -> str:
    """Return a number with its standard error, if it has one."""
    return f"{value:g}" if error is None else f"{value:g} ± {error:g}"


def _times(results: Results) -> dict[str, Any]:
    full = results.seconds("teacher", TEACHER_STEPS)
    points: list[tuple[Sampler, int]] = [
        *(("student", n) for n in results.steps),
        *(("teacher", n) for n in (*results.steps, TEACHER_STEPS)),
    ]
    points = [point for point in points if results.seconds(*point) is not None]
    conditions, rows = sorted({results.conditions(*point) for point in points}), []
    for sampler, n in points:
        value = results.seconds(sampler, n) or 0.0
        ratio = f"{full / value:.{0 if full >= 10 * value else 1}f}x" if full and value else ""
        name = f"{sampler}, {steps_text(n)}"
        name = name if len(conditions) == 1 else f"{name}, in {results.conditions(sampler, n)}"
        rows.append({"name": name, "cells": [seconds(value), ratio]})
    measured = f"in {conditions[0]}" if len(conditions) == 1 else "under different conditions"
    return {
        "caption": (
            f"Network and scheduler only, without decoding, {measured}. Measured during the evaluation, so other load on the "
            "machine is included."
        ),
        "heads": ["Sampler", "Time per image", f"Speedup over the teacher's {TEACHER_STEPS} steps"],
        "rows": rows,
    }
