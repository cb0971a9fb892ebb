"""How a run's files are used in diffusers, ComfyUI, A1111 and on the command line, in the words of their formats."""

from pathlib import Path
from shlex import quote
from typing import Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.export import EXPORTERS
from lcmdistill.export.base import Exporter, library_line
from lcmdistill.export.sampling_facts import facts_from_run
from lcmdistill.teachers.naming import public_path


def uses(run: Path, config: RunConfig, steps: int | None) -> list[dict[str, Any]]:
    """Return one entry per program: its name, lines of text, and code or None.

    Args:
        run: The run folder.
        config: Its settings.
        steps: The recommended number of sampling steps; None is the method's.
    """
    facts, is_lora, place = facts_from_run(run, config), config.student.kind == "lora", public_path(run)
    is_free, export = omega_range(config) is None, None
    if is_lora:
        name, folder, file = facts.family.run_lora_format, "lora", f"{run.name}.safetensors"
        text = "Load the LoRA on the checkpoint that it was trained on"
        if facts.guidance == "input":
            text += "; pass the guidance scale that it was trained with."
        else:
            text += ". " if is_free else "; its guidance is baked into its weights."
        programs = EXPORTERS[name]
    else:
        name, folder, file, text = "pipeline", "pipeline", "", ""
        programs = EXPORTERS["single-file"]
        export = f"lcmdistill export {quote(place)} --format single-file --output {quote(run.name)}.safetensors"
        if facts.guidance == "input":
            text = "Guidance is an input of the network and adds no cost; negative prompts have no effect."
        elif not is_free:
            text = "Guidance is in the weights: sample at guidance scale 1."
    if is_free:
        text += "CFG and negative prompts work, at twice the cost."
    usage = EXPORTERS[name].usage(config, facts, f"{place}/{folder}", file, steps)
    entries = [{"name": "diffusers", "lines": [text], "code": EXPORTERS[name].python(usage)}]
    target = programs.usage(config, facts, place, f"{run.name}.safetensors", steps)
    for use in programs.programs(target) if facts.layout or is_lora else ():
        if not use.is_supported:
            entries.append({"name": use.program, "lines": [*use.lines], "code": None})
            continue
        baked = " with the guidance baked in" if facts.guidance == "input" else ""
        first = () if is_lora else (f"Write a single file{baked}, with the command below.",)
        entries.append({"name": use.program, "lines": [*first, *use.lines], "code": export})
    command = f'lcmdistill sample {quote(place)} --steps {usage.steps} --prompt "a prompt"'
    lines = ["PNGs with embedded settings, and a grid."]
    return [*entries, {"name": "Command line", "lines": lines, "code": command}]


def run_library_line(run: Path, config: RunConfig) -> str:
    """Return how the student that a run wrote is used in Python, in one line."""
    facts = facts_from_run(run, config)
    exporter: Exporter = EXPORTERS[facts.family.run_lora_format if config.student.kind == "lora" else "pipeline"]
    return library_line(exporter, exporter.usage(config, facts, public_path(run)))
