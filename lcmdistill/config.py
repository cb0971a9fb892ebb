"""The configuration: one frozen tree, from defaults < file < flags, and back to TOML. No torch: --help is instant."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union

from lcmdistill.errors import UsageError


class ObjectiveName(StrEnum):
    """The keys of OBJECTIVES, spelled out so that --help needs no torch."""

    lcm = "lcm"


class SolverName(StrEnum):
    """The keys of SOLVERS, spelled out so that --help needs no torch."""

    ddim = "ddim"
    euler = "euler"


class Precision(StrEnum):
    """What autocast does around the network; schedules, conversions and the loss are fp32 always."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Tracker(StrEnum):
    """Where metrics go besides metrics.jsonl."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


# The layers of the published LCM-LoRAs (Luo et al. 2023b). time_cond_proj is not there, and must not be: the programs
# that read LoRA files know no such layer.
LORA_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """[teacher]: the network to distil."""

    model: str = "sd15"
    "tiny, an alias (sd15, sd21), a hub id, or a local diffusers folder"
    revision: str | None = None
    "branch, tag or commit of a hub model"
    variant: str | None = None
    "weight files' variant, such as fp16"
    allow_pickle: bool = False
    "also read .bin weights; a pickle can run any code, so only from an author you trust"


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """[student]: how the student starts."""

    omega_init: Literal["zero", "random"] = "zero"
    "first weights of a full student's omega projection: zero starts exactly at the teacher, random is the scripts' way"
    kind: Literal["full", "lora"] = "full"
    "a network of its own, or an adapter on the teacher's; the command says which"
    target: Literal["ema", "live"] = "ema"
    "the target network: an EMA of the student, or the student itself"
    rank: int = 64
    "r of a LoRA: the rank of each layer's update"
    alpha: float = 64.0
    "alpha of a LoRA: its update is scaled by alpha / r"
    dropout: float = 0.0
    "dropout on a LoRA's inputs, 0 to 1"
    target_modules: tuple[str, ...] = LORA_MODULES
    "which of the teacher's layers get a LoRA, by the end of their names"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: what is learnt on, and how it is prepared."""

    sources: tuple[str, ...] = ("teacher",)
    "shards (folder, file, URL, braces), image folders, tiny, or teacher for no data set at all"
    prompts: str | None = None
    "file of prompts, one a line, for the source `teacher`; by default the bundled list"
    resolution: int = 512
    "side of the training images in pixels, a multiple of the VAE's factor"
    count: int | None = None
    "most samples to prepare; by default what the run can use (files), or one a prompt (teacher)"
    crop: Literal["center", "random"] = "center"
    "which square of a resized image is kept"
    flip: bool = False
    "mirror each image left to right with probability one half"
    caption_drop: float = 0.0
    "share of captions replaced by the empty prompt in training, 0 to 1"
    min_size: int = 0
    "skip images whose shorter side has fewer pixels"
    max_watermark: float | None = None
    "skip images whose metadata say pwatermark above this; images that do not say are kept"
    guidance_scale: float = 7.5
    "guidance with which the source `teacher` draws (diffusers' convention, omega + 1)"
    draw_steps: int = 20
    "DPM-Solver++ steps with which the source `teacher` draws"
    cache_dir: str | None = None
    "where prepared latents are kept and shared between runs; by default ~/.cache/lcmdistill"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """[optim]: AdamW and the size of a step."""

    learning_rate: float = 1e-6
    "AdamW's learning rate after the warm-up"
    batch_size: int = 4
    "samples a process takes at once"
    accumulate: int = 3
    "micro-batches summed up for one step"
    max_train_steps: int = 1000
    "optimiser steps of the whole run"
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    "what the learning rate does after the warm-up"
    warmup_steps: int = 0
    "steps over which the learning rate rises from 0"
    weight_decay: float = 0.0
    "AdamW's weight decay"
    beta1: float = 0.9
    "AdamW's first beta"
    beta2: float = 0.999
    "AdamW's second beta"
    adam_eps: float = 1e-8
    "AdamW's epsilon"
    max_grad_norm: float = 1.0
    "gradients are clipped to this norm; 0 leaves them alone"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """[run]: where, with what seed, and how often to tell."""

    output: str | None = None
    "the run's folder; by default runs/TEACHER-OBJECTIVE"
    seed: int = 0
    "the one seed that every random draw comes from"
    precision: Precision = Precision.auto
    "arithmetic inside the networks; auto is bf16 or fp16 on a GPU that has it, fp32 on a CPU"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1, mps, ..."
    gradient_checkpointing: bool = False
    "recompute activations in the backward pass: less memory, about a third more time"
    log_every: int = 10
    "steps between two lines of metrics"
    checkpoint_every: int = 200
    "steps between two checkpoints"
    keep_checkpoints: int = 2
    "how many of the last checkpoints are kept"
    validate_every: int = 200
    "steps between two validation grids; 0 draws none"
    validation_prompts: tuple[str, ...] = ()
    "prompts of the validation grid; by default a few fixed ones"
    validation_guidance_scale: float | None = None
    "guidance of the validation grid (diffusers' convention, omega + 1); by default the middle of the trained range"
    report_to: Tracker = Tracker.none
    "tracker besides metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is told. `objective` holds the fields of the chosen objective's own dataclass."""

    objective_name: ObjectiveName = ObjectiveName.lcm
    objective: Any = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunSection = field(default_factory=RunSection)


SECTIONS: dict[str, type] = {
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunSection,
}

# What a bare command means for a teacher known by name. Any other teacher starts from the dataclasses' defaults.
ALIAS_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "data.sources": ("tiny",),
        "data.resolution": 64,
        "data.guidance_scale": 4.5,
        "objective.w_min": 1.0,
        "objective.w_max": 5.0,
        "optim.batch_size": 32,
        "optim.accumulate": 1,
        "optim.learning_rate": 1e-4,
        "optim.max_train_steps": 250,
        "run.checkpoint_every": 100,
        "run.validate_every": 125,
    },
    "sd21": {"data.resolution": 768},
}


def read_toml(path: Path) -> dict[str, Any]:
    """A config file as {"section.key": value}. Raises UsageError if it is absent or no TOML."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror}); give an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {section!r} stands outside a section; sections are {_known_sections()}")
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat


def parse_assignment(text: str) -> tuple[str, Any]:
    """One --set argument, `section.key=value`. The value is TOML where it parses, else a string."""
    key, sign, value = text.partition("=")
    if not sign or "." not in key:
        raise UsageError(f"--set {text!r} is not of the form section.key=value, such as optim.learning_rate=1e-5")
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def resolve(file: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """Defaults < the teacher's defaults < file < flags, checked key by key and field by field.

    file, flags: {"section.key": value}. Raises UsageError naming the key, what was got and what is allowed.
    """
    from lcmdistill.objectives import OBJECTIVES

    chosen = {**file, **flags}
    name = _coerce("objective.name", chosen.pop("objective.name", ObjectiveName.lcm), ObjectiveName)
    sections = {**SECTIONS, "objective": OBJECTIVES[name]}
    defaults = ALIAS_DEFAULTS.get(str(chosen.get("teacher.model", TeacherConfig().model)), {})
    values = {**{k: v for k, v in defaults.items() if _known(k, sections)}, **chosen}
    built = {section: _build(section, cls, values) for section, cls in sections.items()}
    unknown = [key for key in values if not _known(key, sections)]
    if unknown:
        raise UsageError(f"unknown config key {unknown[0]!r}{_closest(unknown[0], sections)}")
    config = RunConfig(objective_name=name, **built)
    if config.run.output is None:
        stem = Path(config.teacher.model).name or "run"
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, output=str(Path("runs") / f"{stem}-{name}"))
        )
    _check(config)
    return config


def flatten(config: RunConfig) -> dict[str, Any]:
    """The tree as {"section.key": plain value}, without the keys that are None."""
    flat: dict[str, Any] = {"objective.name": str(config.objective_name)}
    for section in ("objective", *SECTIONS):
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if value is not None:
                flat[f"{section}.{key}"] = str(value) if isinstance(value, StrEnum) else value
    return flat


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML that `--config` reads back to the same tree."""
    import tomli_w

    tree: dict[str, dict[str, Any]] = {}
    for dotted, value in flatten(config).items():
        section, _, key = dotted.partition(".")
        tree.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    return tomli_w.dumps({section: tree[section] for section in ("teacher", "student", "objective", *tree)})


def _known(dotted: str, sections: Mapping[str, type]) -> bool:
    section, _, key = dotted.partition(".")
    return section in sections and key in {f.name for f in dataclasses.fields(sections[section])}


def _known_sections() -> str:
    return ", ".join(sorted([*SECTIONS, "objective"]))


def _closest(dotted: str, sections: Mapping[str, type]) -> str:
    every = [f"{name}.{f.name}" for name, cls in sections.items() for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(dotted, every, n=1, cutoff=0.5)
    # A right key in a wrong section is the commonest slip.
    near = [k for k in every if k.split(".")[1] == dotted.split(".")[-1]] or near
    return f"; did you mean {near[0]!r}?" if near else f"; sections are {_known_sections()}"


def _build(section: str, cls: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    given = {
        f.name: _coerce(f"{section}.{f.name}", values[f"{section}.{f.name}"], hints[f.name])
        for f in dataclasses.fields(cls)
        if f"{section}.{f.name}" in values
    }
    return cls(**given)


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or a UsageError that says what is allowed."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _coerce(key, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value in args:
            return value
        raise UsageError(f"{key} is {value!r}; choose from {', '.join(map(str, args))}")
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, Sequence) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise UsageError(f"{key} is {value!r}; it must be a list of strings")
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if str(value) in [str(member) for member in hint]:
            return hint(str(value))
        raise UsageError(f"{key} is {str(value)!r}; choose from {', '.join(map(str, hint))}")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise UsageError(f"{key} is {value}; it must be a finite number")
    if hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if hint is str and not isinstance(value, bool | list | dict):
        return str(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint]
    raise UsageError(f"{key} is {value!r}; it must be {kind}")


def _check(config: RunConfig) -> None:
    """Ranges that a type does not show."""
    positive = {
        "data.resolution": config.data.resolution,
        "data.draw_steps": config.data.draw_steps,
        "optim.batch_size": config.optim.batch_size,
        "optim.accumulate": config.optim.accumulate,
        "optim.max_train_steps": config.optim.max_train_steps,
        "run.log_every": config.run.log_every,
        "run.checkpoint_every": config.run.checkpoint_every,
        "run.keep_checkpoints": config.run.keep_checkpoints,
    }
    for key, value in positive.items():
        if value < 1:
            raise UsageError(f"{key} is {value}; it must be at least 1")
    if config.data.count is not None and config.data.count < 1:
        raise UsageError(f"data.count is {config.data.count}; it must be at least 1")
    not_negative = {
        "data.min_size": config.data.min_size,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.adam_eps": config.optim.adam_eps,
        "optim.max_grad_norm": config.optim.max_grad_norm,
        "run.seed": config.run.seed,
        "run.validate_every": config.run.validate_every,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise UsageError(f"{key} is {value}; it must be at least 0")
    if not 0.0 <= config.data.caption_drop <= 1.0:
        raise UsageError(f"data.caption_drop is {config.data.caption_drop}; it must be from 0 to 1")
    for key in ("beta1", "beta2"):
        if not 0.0 <= (beta := getattr(config.optim, key)) < 1.0:
            raise UsageError(f"optim.{key} is {beta}; it must be at least 0 and below 1")
    if not config.data.sources:
        raise UsageError("data.sources is empty; name a folder, shards, or teacher")
