"""What the LoRA files that lcmdistill writes record: how they are sampled, and their one rank and alpha."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lcmdistill.config.recorded import run_takes_omega
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.lora.files import Lora, lora_weights_file
from lcmdistill.teachers.lora.kinds import FAMILY_KEY
from lcmdistill.teachers.registry import FAMILIES, family_of_lora_header
from lcmdistill.utils.checksums import verify_checksums
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

SCHEDULER_KEY = "lcmdistill.scheduler"
"the header key with the diffusers scheduler class that the LoRA is sampled with"

SCHEDULER_OPTIONS_KEY = "lcmdistill.scheduler_options"
"the header entry with that class's options besides the base model's betas, as JSON"

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"the file that diffusers looks for in a folder; older versions need its name when offline"


def rank_of(lora: Lora) -> int:
    """Return r, which is the same in every layer that lcmdistill trains."""
    return next(iter(lora.values())).down.shape[0]


def alpha_of(lora: Lora) -> float:
    """Return alpha, which is the same in every layer that lcmdistill trains."""
    return next(iter(lora.values())).alpha


def scheduler_of(lora: str) -> str | None:
    """Return the scheduler that a LoRA's header names; None for one that lcmdistill did not train."""
    try:
        with safe_open(lora_weights_file(lora, f"--lora {lora}"), framework="pt") as file:
            name = (file.metadata() or {}).get(SCHEDULER_KEY)
    except SafetensorError as error:
        raise UsageError(f"--lora {lora} is not a safetensors file: {error}") from error
    known = {kind for each in OBJECTIVES.values() for kind in (each.info.scheduler, each.info.on_flow().scheduler)}
    if name is not None and name not in known:
        raise UsageError(
            f"--lora {lora} names the scheduler {name} in its header, which no method samples with; known are "
            f"{', '.join(sorted(known))}"
        )
    return name


def family_of_lora(folder: Path) -> TeacherFamily:
    """Return the family of the base of a run's LoRA, by its files.

    Args:
        folder: RUN/lora. A peft folder belongs to the family that has no other format; a folder without a file counts as
            Stable Diffusion.

    Raises:
        UsageError: The file is damaged.
    """
    file = next(iter(sorted(folder.glob("[!.]*.safetensors"))), None)
    header: dict[str, str] = {}
    if file is not None:
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
        except SafetensorError as error:
            verify_checksums(folder)  # which states how a run repairs it
            raise UsageError(
                f"{file} is not a safetensors file: {error}; restore it, or export the run again"
            ) from error
    if (key := header.get(FAMILY_KEY, "")) in FAMILIES:
        return FAMILIES[key]
    if (folder / "adapter_config.json").is_file():  # of a run before the key was written
        return next(family for family in FAMILIES.values() if family.uses_peft_only)
    return family_of_lora_header(header)


def run_takes_guidance(run: Path) -> bool:
    """Return whether a run's student takes guidance as an input: a full one's omega, or the base's own embedded guidance."""
    is_lora = (run / "lora").is_dir() and not (run / "pipeline").is_dir()
    return run_takes_omega(run) or (is_lora and family_of_lora(run / "lora").embeds_guidance)


def scheduler_options_of(lora: str) -> dict[str, Any]:
    """Return the scheduler options that a LoRA's header records; {} if there are none."""
    with safe_open(lora_weights_file(lora, f"--lora {lora}"), framework="pt") as file:
        return read_scheduler_options(file.metadata() or {})


def read_scheduler_options(header: Mapping[str, str]) -> dict[str, Any]:
    """Return the scheduler options of a header; {} if it has none, or unreadable ones."""
    try:
        options = parse_json(header.get(SCHEDULER_OPTIONS_KEY, "{}"))
    except ValueError:
        return {}
    return options if isinstance(options, dict) else {}
