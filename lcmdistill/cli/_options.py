"""Options of the commands. Those of the training commands have the texts, types and defaults of config/schema.py."""

import re
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from lcmdistill.config.presets import PresetName
from lcmdistill.config.reference import help_text
from lcmdistill.config.schema import SECTIONS
from lcmdistill.diffusion import SOLVERS
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_names import run_path

Private = Annotated[
    bool,
    typer.Option(
        "--private", help="With --push-to-hub: a new repository is private; an existing one keeps its visibility."
    ),
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]

PushToHub = Annotated[
    str | None,
    typer.Option(help="Upload the result and its model card to this hub repository (OWNER/NAME); needs a login."),
]


def finite(value: float | None) -> float | None:
    """Return a guidance scale.

    Raises:
        UsageError: The value is not a number, or larger than any network can use.
    """
    if value is not None and not abs(value) <= 1000:
        raise UsageError(f"--guidance-scale is {value}; it must be a number from -1000 to 1000")
    return value


def run_folder(run: Path) -> Path:
    """Return the path of a run from its path or its name under runs/; its last part is a name, which "." is not."""
    run = run_path(str(run))
    return run.resolve() if run.name in ("", "..") else run


def model_or_run(model: str | None) -> str | None:
    """Return a model as it was specified, or the path of the run under runs/ that has this name."""
    from lcmdistill.teachers.naming import ALIASES

    return model if model is None or model in ALIASES or "://" in model else str(run_path(model))


def one_of(registry: Iterable[str]) -> Any:
    """Return the type of an option that takes a key of a registry."""
    return Literal[tuple(registry)]  # pyright: ignore[reportInvalidTypeForm]


def _option(kind: Any, text: str, *names: str, group: str, metavar: str | None = None) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=group, metavar=metavar)]


# The settings that have an option, by their group in --help: {group: (keys)}. Each command shows those of its kind of student.
GROUPS: dict[str, tuple[str, ...]] = {
    "Most used": ("teacher.model", "data.sources", "run.output", "optim.max_train_steps", "run.memory"),
    "Model": (
        "teacher.revision",
        "teacher.variant",
        "teacher.prediction_type",
        "teacher.vae",
        "teacher.text_encoder",
        "teacher.base",
        "teacher.loras",
        "teacher.clip_skip",
        "teacher.drop",
    ),
    "Data": ("data.prompts", "data.resolution", "data.buckets"),
    "Method": ("objective.name", "objective.solver", "objective.guidance", "objective.skip", "student.start"),
    "LoRA": (
        "student.rank",
        "student.alpha",
        "student.target",
        "student.dropout",
        "student.target_modules",
        "student.quantize_base",
        "student.lora_relative_to",
    ),
    "Optimization": ("optim.learning_rate", "optim.batch_size", "optim.gradient_accumulation_steps"),
    "Run": ("run.seed", "run.precision", "run.device", "run.report_to", "run.push_to_hub", "run.hub_private"),
    "Advanced": ("run.shard", "run.compile", "run.profile"),
}

OTHER_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "sample": {
        "Most used": ("prompt", "steps", "guidance_scale", "num_images", "seed", "output"),
        "Model": ("base", "lora", "lora_scale", "vae", "text_encoder", "parts_from", "prediction_type", "clip_skip"),
        "Prompts": ("prompts", "negative_prompt"),
        "Size": ("resolution", "width", "height"),
        "Start image": ("image", "strength", "mask"),
        "Sampler": ("scheduler", "eta", "batch_size"),
    },
    "evaluate": {
        "Most used": ("steps", "guidance_scale", "num_images", "prompts", "output", "rank_by"),
        "Comparison": ("real", "protocol"),
        "Metrics": ("features", "inception", "clip", "lpips", "scorer"),
        "Sampling": ("eta", "seed", "batch_size"),
    },
}
"the same for commands whose options are no settings: {command: {group: (parameters)}}"

RENAMED_OPTIONS = {
    "teacher.model": "teacher",
    "teacher.loras": "teacher_lora",
    "data.sources": "data",
    "objective.name": "objective",
    "run.hub_private": "private",
}
"options that are not called as their setting"

SETTINGS = {RENAMED_OPTIONS.get(key, key.split(".")[1]): key for keys in GROUPS.values() for key in keys}
"option -> the setting that it stands for"

OBJECTIVE_TYPES: dict[str, Any] = {
    "objective.name": one_of(OBJECTIVES),
    "objective.solver": one_of(SOLVERS),
    "objective.guidance": Literal["baked", "free"],
    "objective.skip": int,
}


class GroupedCommand(TyperCommand):
    """A command whose --help lists its options by group, in plain text that reads the same in a terminal and in a pipe."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options in the order of GROUPS."""
        own = OTHER_GROUPS.get(self.name or "", {})
        groups: dict[str, list[Any]] = {"Arguments": [], **{name: [] for name in (*GROUPS, *own)}, "Options": []}
        group_of = {parameter: name for name, parameters in own.items() for parameter in parameters}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            name = getattr(parameter, "rich_help_panel", None) or group_of.get(parameter.name or "", "Options")
            if record := parameter.get_help_record(ctx):
                names, text = record
                names = re.sub(r"<list\[(\w+)\]>", r"<\1>...", names).replace(" range>", ">")
                groups["Arguments" if is_argument else name].append((names, text))
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


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
            typer.Option(
                help=help_text(key, OBJECTIVES.locations, kind),
                rich_help_panel=group,
                metavar="<str>..." if list in [get_origin(each) for each in get_args(option_type(key))] else None,
            ),
        ]
        for group, keys in GROUPS.items()
        for key in keys
        if group != "LoRA" or kind == "lora"
    }


def training_options(kind: str) -> dict[str, Any]:
    """Return all options of a training command."""
    return {
        **setting_options(kind),
        "dry_run": _option(
            bool, "Check everything, show what the run does and costs, and exit.", "--dry-run", group="Most used"
        ),
        "full": _option(bool, "With --dry-run: also print all settings as TOML.", "--full", group="Run"),
        "preset": _option(
            PresetName | None, "Published settings by name; --config and options override them.", group="Run"
        ),
        "config": _option(
            Path | None, "TOML file of settings, or a shipped one by name (list); options override it.", group="Run"
        ),
        "set_": _option(
            list[str] | None,
            "Any setting, such as optim.beta1=0.95; repeatable. --dry-run --full prints all settings.",
            "--set",
            group="Advanced",
            metavar="SECTION.KEY=VALUE",
        ),
        "debug": _option(bool, "Show the traceback when something fails.", "--debug", group="Advanced"),
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
