"""The options of the training commands. Their texts, types and defaults are those of the settings in config/schema.py."""

import math
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from lcmdistill.config.presets import PresetName
from lcmdistill.config.reference import help_text
from lcmdistill.config.schema import SECTIONS
from lcmdistill.diffusion import SOLVERS
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.utils.errors import UsageError

Private = Annotated[
    bool,
    typer.Option(
        "--private", help="With --push-to-hub: a new repository is private; an existing one keeps its visibility."
    ),
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]

PushToHub = Annotated[
    str | None,
    typer.Option(help="Upload the result and its model card to this hub repository (OWNER/NAME); needs a login."),
]


def finite(value: float | None) -> float | None:
    """A number that is given must be one."""
    if value is not None and not math.isfinite(value):
        raise UsageError(f"--guidance-scale is {value}; it must be a finite number")
    return value


def one_of(registry: Iterable[str]) -> Any:
    """Return the type of an option that takes a key of a registry."""
    return Literal[tuple(registry)]  # pyright: ignore[reportInvalidTypeForm]


def _option(kind: Any, text: str, *names: str, panel: str | None = None) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel)]


# The settings that have an option, by help panel: {panel: (keys)}. Each command shows those of its kind of student.
PANELS: dict[str, tuple[str, ...]] = {
    "Model": ("teacher.model",),
    "Data": ("data.sources", "data.prompts", "data.resolution", "data.buckets"),
    "Method": ("objective.name", "objective.solver", "objective.guidance", "objective.skip"),
    "LoRA": ("student.rank", "student.alpha", "student.target", "student.dropout", "student.target_modules"),
    "Optimization": (
        "optim.learning_rate",
        "optim.max_train_steps",
        "optim.batch_size",
        "optim.gradient_accumulation_steps",
    ),
    "Run": (
        "run.output",
        "run.seed",
        "run.precision",
        "run.memory",
        "run.device",
        "run.report_to",
        "run.push_to_hub",
        "run.hub_private",
    ),
    "Advanced": (
        "run.compile",
        "run.profile",
        "teacher.revision",
        "teacher.variant",
        "teacher.prediction_type",
        "teacher.vae",
        "teacher.clip_skip",
        "teacher.drop",
    ),
}

RENAMED_OPTIONS = {
    "teacher.model": "teacher",
    "data.sources": "data",
    "objective.name": "objective",
    "run.hub_private": "private",
}
"options that are not called as their setting"

SETTINGS = {RENAMED_OPTIONS.get(key, key.split(".")[1]): key for keys in PANELS.values() for key in keys}
"option -> the setting that it stands for"

OBJECTIVE_TYPES: dict[str, Any] = {
    "objective.name": one_of(OBJECTIVES),
    "objective.solver": one_of(SOLVERS),
    "objective.guidance": Literal["baked", "free"],
    "objective.skip": int,
}


def option_type(key: str) -> Any:
    """Return the type of a setting's option; None, which is always allowed, is an option that was not passed."""
    section, _, name = key.partition(".")
    kind = OBJECTIVE_TYPES[key] if section == "objective" else get_type_hints(SECTIONS[section])[name]
    if type(None) in get_args(kind):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return (list[str] if get_origin(kind) is tuple else kind) | None


def setting_options(kind: str) -> dict[str, Any]:
    """Return the options of a training command for settings, from the schema. kind: "full" or "lora"."""
    names = {key: name for name, key in SETTINGS.items()}
    return {
        names[key]: Annotated[
            option_type(key),
            typer.Option(help=help_text(key, OBJECTIVES.locations, kind), rich_help_panel=panel),
        ]
        for panel, keys in PANELS.items()
        for key in keys
        if panel != "LoRA" or kind == "lora"
    }


def training_options(kind: str) -> dict[str, Any]:
    """Return all options of a training command."""
    return {
        **setting_options(kind),
        "preset": _option(
            PresetName | None, "Published settings by name; --config and options override them.", panel="Run"
        ),
        "config": _option(Path | None, "TOML file of settings; options override it.", panel="Run"),
        "set_": _option(
            list[str] | None,
            "Any setting as section.key=value; repeatable. --dry-run prints all settings.",
            "--set",
            panel="Run",
        ),
        "dry_run": _option(
            bool, "Check everything, print the settings and an estimate, and exit.", "--dry-run", panel="Run"
        ),
        "debug": Debug,
    }


def takes(options: Mapping[str, Any]) -> Callable[[Callable[..., Path]], Callable[..., Path]]:
    """Return a decorator that gives a function of **keywords these options as its signature, which is what typer reads.

    The default of an option is None, and of a flag False.
    """

    def with_options(command: Callable[..., Path]) -> Callable[..., Path]:
        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if kind.__origin__ is bool else None, annotation=kind)
            for name, kind in options.items()
        ]
        command.__signature__ = Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = dict(options)
        return command

    return with_options
