"""`lcmdistill distill` and `lcmdistill distill-lora`: resolve the configuration, check it, run it."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from lcmdistill.cli._options import SETTINGS, model_or_run, takes, training_options
from lcmdistill.config.examples import config_file, describe_examples
from lcmdistill.config.presets import PRESETS
from lcmdistill.config.recorded import RENAMED, check_recorded_file
from lcmdistill.config.resolve import parse_assignment, preset_changes, resolve
from lcmdistill.config.schema import RunConfig, StudentConfig
from lcmdistill.config.toml import read_toml
from lcmdistill.utils import runtime
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.launch import process_index

logger = logging.getLogger(__name__)


@takes(training_options("full"))
def distill(**options: Any) -> Path:
    """Distill a teacher into a few-step student. Re-run the same command to resume."""
    return _train("full", options)


@takes(training_options("lora"))
def distill_lora(**options: Any) -> Path:
    """Train an LCM-LoRA: a small file with which the checkpoint generates images in 2 to 8 steps."""
    return _train("lora", options)


def _is_set(value: Any) -> bool:
    """Return whether an option was given; 0 is a value."""
    return value is not None and value is not False and value != []


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Return what the --set options assign. Former names of settings are accepted here, and the present one is reported."""
    flags: dict[str, Any] = {}
    for text in texts:
        key, value = parse_assignment(text)
        if key in RENAMED:
            logger.info(f"--set {key} is now called {RENAMED[key]}")
        flags[RENAMED.get(key, key)] = value
    return flags


def configuration_from(kind: str, options: dict[str, Any]) -> RunConfig:
    """Return the configuration that a training command's options describe, and log what a preset changes.

    Args:
        kind: "full" or "lora".
        options: The command's options, by name.

    Raises:
        UsageError: A setting is not allowed, or not for this command.
    """
    if str(options["config"]) == "list":
        for name, what, command in describe_examples():
            print(f"{name}\n    {what}\n    {command}")
        raise typer.Exit
    flags = _assignments(options["set_"] or ())
    flags |= {key: options[name] for name, key in SETTINGS.items() if _is_set(options.get(name))}
    if "teacher.model" in flags:
        flags["teacher.model"] = model_or_run(str(flags["teacher.model"]))
    if "student.kind" in flags:
        raise UsageError("student.kind is not for --set: distill trains a full student, distill-lora a LoRA")
    for field in dataclasses.fields(StudentConfig):
        only_for, command = field.metadata.get("only_for", kind), {"lora": "distill-lora", "full": "distill"}
        if only_for != kind and f"student.{field.name}" in flags:
            raise UsageError(
                f"student.{field.name} is a setting of {command[only_for]} and has no effect on {command[kind]}; remove it, or "
                f"run lcmdistill {command[only_for]}"
            )
    flags["student.kind"] = kind
    path = config_file(str(options["config"])) if options["config"] else None
    file = read_toml(path) if path else {}
    if path:
        check_recorded_file(path)
    if (recorded := file.get("student.kind", kind)) != kind:
        command = "distill-lora" if recorded == "lora" else "distill"
        raise UsageError(
            f"--config {options['config']} is for {command}: its student.kind is {recorded!r}; run lcmdistill {command}"
        )
    if options["full"] and not options["dry_run"]:
        raise UsageError("--full is for --dry-run; remove this option, or add --dry-run")
    preset = options["preset"]
    from lcmdistill.objectives import OBJECTIVES

    resolved = resolve(file, flags, preset, objectives=OBJECTIVES)
    if preset and process_index() == 0:
        changes = preset_changes({**file, **flags}, preset, objectives=OBJECTIVES)
        logger.info(
            f"preset {preset} ({PRESETS[preset].source}), against the defaults:{'' if changes else ' no difference'}"
        )
        for change in changes:
            logger.info(f"  {change}")
    if resolved.run.hub_private and not resolved.run.push_to_hub:
        raise UsageError("--private is for --push-to-hub; remove this option, or add --push-to-hub OWNER/NAME")
    return resolved


def _train(kind: str, options: dict[str, Any]) -> Path:
    """Resolve the configuration and run it. options: a training command's own, by name."""
    began = runtime.clock()
    resolved = configuration_from(kind, options)
    from lcmdistill.hub.client import check_login
    from lcmdistill.training import preflight

    if resolved.run.push_to_hub and process_index() == 0:
        check_login(resolved.run.push_to_hub)
    preflight.check_early(resolved)
    if options["dry_run"]:
        preflight.dry_run(resolved, full=options["full"], began=began)
        return Path(resolved.run.output or "")
    from lcmdistill import run

    return run(resolved)
