"""Read the configuration that a run folder records."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import TeacherConfig
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints


def run_takes_omega(run: Path) -> bool:
    """Whether the U-Net of a finished run's pipeline has an omega input, by its file. Raises UsageError if that is no JSON."""
    path = run / "pipeline" / "unet" / "config.json"
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("time_cond_proj_dim") is not None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


def load_run_config(folder: Path) -> dict[str, Any]:
    """{"section.key": value} of the run in a folder; empty if there is none, or another program's config.toml."""
    path = folder / "config.toml"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    sections = {name: values for name, values in tree.items() if isinstance(values, dict)}
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return flat if {"teacher.model", "objective.name", "optim.max_train_steps"} <= flat.keys() else {}


def resumable_config(folder: Path) -> dict[str, Any]:
    """`recorded`, of a run that has a checkpoint to go on from; empty for one that failed before its first."""
    return load_run_config(folder) if checkpoints(folder / "checkpoints") else {}


def teacher_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_teacher` is to be told for a recorded run's teacher: model, revision, its VAE and the like."""
    keys = [field.name for field in dataclasses.fields(TeacherConfig)]
    return {key: settings[f"teacher.{key}"] for key in keys if f"teacher.{key}" in settings}


def objective_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the [objective] section of a run's settings, {"section.key": value}, by key."""
    start = "objective."
    return {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}


def has_trained_student(folder: Path) -> bool:
    """Whether what a run was for is there: RUN/pipeline of a full student, RUN/lora of an adapter."""
    if load_run_config(folder).get("student.kind") == "lora":
        return any((folder / "lora").glob("*.safetensors"))
    return (folder / "pipeline" / "model_index.json").is_file()
