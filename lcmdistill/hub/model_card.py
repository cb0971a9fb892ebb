"""The model card: one template, rendered from a run's settings and results for the run itself or for one export."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any

from PIL import Image

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.lora_words import lora_names, split_lora
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, settings_to_toml
from lcmdistill.evaluation.results import read_results
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.export import EXPORTERS
from lcmdistill.export.base import Exporter, ProgramUse, needs_loras
from lcmdistill.export.sampling_facts import Betas, SamplingFacts, facts_from_run, facts_from_teacher
from lcmdistill.export.trained_student import TrainedStudent
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.naming import (
    PREDICTED,
    is_local,
    license_name,
    license_of,
    public_name,
    public_path,
    redact_paths,
)
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.json_text import parse_json

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"

RECORD = "card.json"
"the file of a run with the digest of its generated README.md, and the facts that it was rendered from"

PLOTS = {"quality": "Quality against sampling steps, compared with the teacher", "training": "Training curves"}
"name of a plot in RUN/samples -> its title"

GUIDANCE = {
    "input": "Guidance is an input of the network: sampling takes one forward pass per step, and negative prompts have no "
    "effect.",
    "embedded": "The guidance scale is an input of the network: pass the one that the student was trained with. Sampling takes "
    "one forward pass per step, and negative prompts have no effect.",
    "baked": "Guidance is baked into the weights: sample at guidance scale 1, or 2 at most.",
    "free": "Trained without baked-in guidance: guidance scales above 1 and negative prompts work, at twice the cost per "
    "step.",
    "start": "Guidance acts as on the model that it was fine-tuned from, which has no guidance input.",
}


@dataclass(frozen=True)
class Card:
    """A model card and the pictures that it shows, {path next to the card: file}."""

    text: str
    pictures: Mapping[str, Path] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write README.md and the pictures into a folder."""
        for name, file in self.pictures.items():
            if (folder / name).resolve() != file.resolve():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
        write_text(folder / "README.md", self.text)


def render_card(
    config: RunConfig, run: Path, facts: SamplingFacts, *, export: tuple[str, str, str] | None = None
) -> Card:
    """Render the card of a run, or of one of its exports.

    Local paths appear by their last part only, and guidance in both conventions.

    Args:
        config: The run's settings.
        run: The run folder; its pictures and results are shown if they exist.
        facts: How the student is sampled.
        export: (format, hub repository or folder, file name) of an export; None for the card of the run itself.
    """
    from huggingface_hub import ModelCard

    name, place, file = export or _run_export(config, run, facts)
    exporter: Exporter = EXPORTERS[name]
    usage = exporter.usage(config, facts, place, file)
    grids = sorted((run / "samples").glob("step-*.png"))
    samples = [] if facts.family.in_pixels else sorted((run / "samples").glob("sample-*.png"))
    measured = _measured(run, config)
    pictures = [*grids[-1:], *samples, *(run / each["file"] for each in (measured or {}).get("plots", ()))]
    command = "" if export else f"lcmdistill sample {quote(public_path(run))} --steps {usage.steps}"
    if command and (facts.classes or not facts.family.in_pixels):
        command += f' --prompt "{facts.classes[0] if facts.classes else "a prompt"}"'
    programs = list(exporter.programs(usage))
    if not export and config.student.kind == "full" and facts.layout:
        single = (
            f"lcmdistill export {quote(public_path(run))} --format single-file --output {quote(run.name)}.safetensors"
        )
        writer: Exporter = EXPORTERS["single-file"]
        target = writer.usage(config, facts, public_path(run), f"{run.name}.safetensors", usage.steps)
        uses = writer.programs(target)
        if names := " and ".join(use.program for use in uses if use.is_supported):
            programs.append(ProgramUse(names, (f"Write a single file first: `{single}`.",)))
        programs += uses
    settings = redact_paths(flatten(config))
    card = ModelCard.from_template(
        _metadata(config, facts, {f"samples/{path.name}": _prompt(path) for path in samples}),
        template_path=str(TEMPLATE),
        title=f"{run.name}: {public_name(config.teacher.model)} in {usage.counts.span}",
        intro=_intro(config),
        facts=_facts(config, facts),
        grid=f"samples/{grids[-1].name}" if grids else None,
        measured=measured,
        programs=programs,
        code=exporter.python(usage),
        command=command,
        guidance=_guidance(config, facts, exporter),
        settings=settings_to_toml(settings).strip(),
    )
    return Card(f"{str(card).rstrip()}\n", {f"samples/{path.name}": path for path in pictures})


def _run_export(config: RunConfig, run: Path, facts: SamplingFacts) -> tuple[str, str, str]:
    """Return the format, the folder and the file name of what the run itself wrote."""
    folder = public_path(run)
    if config.student.kind == "full":
        return "pipeline", f"{folder}/pipeline", ""
    form = facts.family.run_lora_format
    return form, f"{folder}/lora", "" if form == "peft" else f"{run.name}.safetensors"


def _metadata(config: RunConfig, facts: SamplingFacts, samples: Mapping[str, str]) -> Any:
    """Return the hub's metadata; samples: {picture: its prompt}."""
    from huggingface_hub import ModelCardData

    name, is_lora = public_name(config.teacher.model), config.student.kind == "lora"
    is_hub_id = not is_local(name)
    family = facts.family
    tags = [*family.tags, *config.objective.info.tags, "lcmdistill"]
    widget = [{"text": prompt, "output": {"url": file}} for file, prompt in samples.items()]
    optional: dict[str, Any] = {**license_of(config.teacher.model), **({"widget": widget} if widget else {})}
    return ModelCardData(
        library_name="peft" if is_lora and family.uses_peft_only else "diffusers",
        pipeline_tag=family.task,
        base_model=name if is_hub_id else None,
        base_model_relation=("adapter" if is_lora else "finetune") if is_hub_id else None,
        tags=[*tags, "lora"] if is_lora else tags,
        **optional,
    )


def _intro(config: RunConfig) -> str:
    method, is_lora = config.objective.info, config.student.kind == "lora"
    title = method.lora_title if is_lora else method.title
    article = "An" if title.startswith(("LCM", "LoRA")) else "A"
    size = f" of rank {config.student.rank}, alpha {config.student.alpha:g}" if is_lora else ""
    license_ = license_name(license_of(config.teacher.model))
    terms = (
        f"The license is the teacher's: {license_}."
        if license_
        else "The license is the teacher's; see its model card."
    )
    loras = lora_names(config.teacher.loras)
    base = f"`{public_name(config.teacher.model)}`" + (f" with the LoRA {loras}" if loras else "")
    return f"{article} {title}{size} ({method.paper}), {method.relation} {base} with lcmdistill. {terms}"


def _facts(config: RunConfig, facts: SamplingFacts) -> list[str]:
    """Return the list at the top of a card: guidance, training, weights, and what was changed in the teacher."""
    objective, omegas = config.objective, omega_range(config)
    guidance = "trained without guidance"
    if omegas:
        guidance = f"{omegas.omega}, which is diffusers' `guidance_scale` {omegas.scale} (omega + 1)"
    if omegas and facts.family.embeds_guidance:
        guidance = f"guidance scale {omegas.scale}, an input of the network"
    if _is_as_started(config, facts):
        guidance = "guidance as in the starting model"
    weights = "EMA" if config.student.target == "ema" else "live student"
    lines = [
        guidance,
        f"{config.optim.max_train_steps} optimizer steps, {objective.info.describe(objective)}, {config.data.resolution} px",
        f"weights of the {weights}; the teacher predicts {PREDICTED.get(facts.prediction_type, facts.prediction_type)}",
    ]
    skip, family = config.teacher.clip_skip, facts.family
    if skip:
        in_files = family.clip_skip == "baked" and config.student.kind == "full"
        how = "the saved text encoder already skips them" if in_files else "sample with the same setting"
        theirs = family.a1111_clip_skip(skip)
        lines.append(f"skips {skip} of CLIP's last layers (`clip_skip={skip}`, A1111's clip skip {theirs}): {how}")
    if config.teacher.vae:
        lines.append(f"uses the VAE `{public_name(config.teacher.vae)}` instead of the teacher's")
    for encoder in config.teacher.text_encoder or ():
        lines.append(f"uses the text encoder `{public_name(encoder)}` instead of the teacher's")
    if config.teacher.base:
        lines.append(f"takes the parts that the teacher's file lacks from `{public_name(config.teacher.base)}`")
    needed = "; load them together with this LoRA" if needs_loras(config) else "; this student contains them"
    for word, checksum in zip(config.teacher.loras or (), config.teacher.lora_checksums or (), strict=False):
        lora = split_lora(word)
        lines.append(
            f"the LoRA `{lora.name}` was fused into the teacher at scale {lora.scale:g} (SHA-256 `{checksum[:10]}`){needed}"
        )
    if "safety_checker" in (config.teacher.drop or ()):
        lines.append("without the teacher's safety checker")
    if encoders := [f"`{part}`" for part in facts.absent_parts if part.startswith("text_encoder")]:
        lines.append(f"trained without {' and '.join(encoders)}; sample without it as well")
    return lines


def _is_as_started(config: RunConfig, facts: SamplingFacts) -> bool:
    """Return whether a fine-tuned student was never given omega, and its start has a guidance of its own."""
    return facts.guidance == "baked" and config.objective.omega == "teacher"


def _guidance(config: RunConfig, facts: SamplingFacts, exporter: Exporter) -> str:
    if facts.family.in_pixels:
        return f"Its classes, from 0: {', '.join(facts.classes)}." if facts.classes else "It takes no prompt."
    if _is_as_started(config, facts):
        return GUIDANCE["start"]
    if facts.family.embeds_guidance:
        return GUIDANCE["embedded"]
    is_baked_now = facts.guidance == "input" and exporter.bakes_guidance and config.student.kind == "full"
    return GUIDANCE["baked" if is_baked_now else facts.guidance]


def _measured(run: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the results of the run's evaluation for the template; None without results for its present weights."""
    results = read_results(run)
    if results is None or not results.is_current(config):
        return None
    judged, measures = verdict(results), results.metrics
    rows = []
    for n in results.steps:
        numbers = [results.number(name, "student", n) for name in measures]
        rows.append([str(n), *("" if value is None else f"{value:g}" for value in numbers)])
    features = "; ".join(f"{each['label']}: {each['measured_on']}, {each['published']}" for each in measures.values())
    protocol = f"{results.protocol} " if results.protocol else ""
    count = f"{results.info['images']} images per row, guidance scale {results.guidance_scale:g}"
    limits = "".join(f" {each['label']}: {each['limits']}" for each in measures.values() if each.get("limits"))
    return {
        "headline": judged.headline,
        "reasons": judged.reasons,
        "labels": [each["label"] for each in measures.values()],
        "rows": rows,
        "about": f"{protocol}{count}. {features}.{limits}",
        "plots": [
            {"file": f"samples/{name}.png", "title": title}
            for name, title in PLOTS.items()
            if (run / "samples" / f"{name}.png").is_file()
        ],
    }


def _prompt(picture: Path) -> str:
    """Return the prompt that a sample picture carries."""
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            return str(image.info.get("prompt", ""))
    except OSError:  # damaged: its prompt is not known
        return ""


def model_card(config: RunConfig, folder: Path, teacher: Teacher) -> str:
    """Return the text of a run's card, without pictures that do not exist yet."""
    return render_card(config, folder, facts_from_teacher(config, teacher)).text


def write_run_card(config: RunConfig, folder: Path, teacher: Teacher) -> None:
    """Write the card of a run that has just finished, also next to its LoRA."""
    _write_card(config, folder, facts_from_teacher(config, teacher))


def update_run_card(run: Path) -> bool:
    """Render the card of an evaluated run again, with its results and plots.

    Returns:
        Whether RUN/README.md shows the results of the run as it is now.
    """
    config = require_run_config(run)
    if _measured(run, config) is None:
        return False
    return _write_card(config, run, recorded_facts(run, config))


def _write_card(config: RunConfig, run: Path, facts: SamplingFacts) -> bool:
    """Write RUN/README.md, unless the user has edited it; return whether it was written."""
    path, card = run / "README.md", render_card(config, run, facts)
    own = (_record(run).get("sha256"), _digest(card.text))  # the second if a kill came between the card and its record
    if path.is_file() and _digest(path.read_text(encoding="utf-8", errors="replace")) not in own:
        logger.info(f"{path} was edited and is not overwritten; remove it to generate it again")
        written = False
    else:
        card.write(run)
        write_text(run / RECORD, json.dumps({"sha256": _digest(card.text), "facts": asdict(facts)}, indent=1) + "\n")
        written = True
    if config.student.kind == "lora" and (run / "lora").is_dir():
        card.write(run / "lora")
    return written


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _record(run: Path) -> dict[str, Any]:
    path = run / RECORD
    try:
        record = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:  # damaged: the card counts as edited
        return {}
    return record if isinstance(record, dict) else {}


def recorded_facts(run: Path, config: RunConfig) -> SamplingFacts:
    """Return the facts that a run's card was rendered from, or those of its files if it was written without a record."""
    recorded = _record(run).get("facts")
    if not isinstance(recorded, dict):
        return facts_from_run(run, config)
    names = {each.name for each in fields(SamplingFacts)}
    known: dict[str, Any] = {key: value for key, value in recorded.items() if key in names}
    lists: dict[str, Any] = {key: tuple(known.get(key, ())) for key in ("classes", "absent_parts")}
    betas = Betas(*known["betas"]) if known.get("betas") else None
    return SamplingFacts(**{**known, **lists, "betas": betas})


def export_card(run: Path, name: str, place: str, file: str = "") -> Card:
    """Return the card of one export of a run.

    Args:
        run: The run folder.
        name: The format.
        place: The hub repository or folder that holds the export.
        file: Its file name, if the format is a file.
    """
    config = require_run_config(run)
    return render_card(config, run, recorded_facts(run, config), export=(name, place, file))


def put_export_card(student: TrainedStudent, name: str, output: Path, folder: Path) -> None:
    """Write the card of an export into the folder that becomes `output`."""
    export_card(student.run, name, public_path(output)).write(folder)
