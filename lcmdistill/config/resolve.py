"""The configuration: one frozen tree, from defaults < preset < file < flags, and back to TOML. No torch: --help is instant."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union

from lcmdistill.config.defaults import (
    ALIAS_DEFAULTS,
    FREE_GUIDANCE_DEFAULTS,
    LORA_ALIAS_DEFAULTS,
    LORA_DEFAULTS,
    OBJECTIVE_DEFAULTS,
)
from lcmdistill.config.methods import omega_range
from lcmdistill.config.presets import PRESETS
from lcmdistill.config.schema import SECTIONS, ObjectiveName, RunConfig, TeacherConfig, known_sections
from lcmdistill.config.toml import flatten, read_toml
from lcmdistill.utils.errors import UsageError


def parse_assignment(text: str) -> tuple[str, Any]:
    """One --set argument, `section.key=value`. The value is TOML where it parses, else a string."""
    key, sign, value = text.partition("=")
    if not sign or "." not in key:
        raise UsageError(f"--set {text!r} is not of the form section.key=value, such as optim.learning_rate=1e-5")
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def resolve(
    file: Mapping[str, Any], flags: Mapping[str, Any], preset: str | None = None, *, objectives: Mapping[str, Any]
) -> RunConfig:
    """Defaults < the teacher's defaults < preset < file < flags, checked key by key and field by field.

    file, flags: {"section.key": value}; preset: one of PRESETS; objectives: name -> class, the
    registry of a layer above. Raises UsageError naming the key, what was got and what is
    allowed.
    """
    chosen = {**file, **flags}
    name = _coerce("objective.name", chosen.pop("objective.name", ObjectiveName.lcm), ObjectiveName)
    sections = {**SECTIONS, "objective": objectives[name]}
    model, is_lora = str(chosen.get("teacher.model", TeacherConfig().model)), chosen.get("student.kind") == "lora"
    defaults = ALIAS_DEFAULTS.get(model, {})
    if is_lora:
        defaults = {**defaults, **LORA_DEFAULTS, **LORA_ALIAS_DEFAULTS.get(model, {})}
    defaults = {**defaults, **_of_run(Path(model)), **OBJECTIVE_DEFAULTS.get(name, {})}
    if {**defaults, **chosen}.get("objective.guidance") == "free":
        defaults |= FREE_GUIDANCE_DEFAULTS
    defaults = {**defaults, **_preset_values(preset, "lora" if is_lora else "full")}
    values = {**{k: v for k, v in defaults.items() if v is not None and _known(k, sections)}, **chosen}
    built = {section: _build(section, cls, values) for section, cls in sections.items()}
    unknown = [key for key in values if not _known(key, sections)]
    if unknown:
        section, _, key = unknown[0].partition(".")
        if section == "objective" and any(key in {f.name for f in dataclasses.fields(o)} for o in objectives.values()):
            own = ", ".join(f.name for f in dataclasses.fields(objectives[name]))
            raise UsageError(f"objective.{key} is no setting of {name}, which has {own}")
        raise UsageError(f"unknown config key {unknown[0]!r}{_closest(unknown[0], sections)}")
    config = RunConfig(objective_name=name, chosen=frozenset(values), **built)
    if config.run.output is None:
        output = (
            Path("runs")
            / f"{Path(model).name.removesuffix('.safetensors') or 'run'}-{name}{'-lora' if is_lora else ''}"
        )
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output=str(output)))
    if "data.sources" not in flags and any(spec.startswith("pipe:") for spec in config.data.sources):
        raise UsageError("data.sources: pipe: runs a shell command and is not taken from a file; give it as --data")
    _check(config)
    return config


def _preset_values(preset: str | None, kind: str) -> Mapping[str, Any]:
    if preset is None:
        return {}
    values = PRESETS[preset].values(kind)
    if values is None:
        command, named = ("distill-lora", "lora") if kind == "lora" else ("distill", "full")
        fit = ", ".join(name for name, each in PRESETS.items() if each.values(named) is not None)
        raise UsageError(f"--preset {preset} is not for {command}; choose from {fit}")
    return values


def preset_changes(flags: Mapping[str, Any], preset: str, *, objectives: Mapping[str, Any]) -> list[str]:
    """What a preset says otherwise than the defaults do for the same teacher, objective and command: "key: old -> new"."""
    about = {k: v for k, v in flags.items() if k in ("teacher.model", "objective.name", "student.kind")}
    usual, said = (flatten(resolve({}, about, each, objectives=objectives)) for each in (None, preset))
    return [f"{key}: {usual.get(key)} -> {value}" for key, value in said.items() if usual.get(key) != value]


def has_key(config: RunConfig, dotted: str) -> bool:
    """Whether "section.key" is a setting of this run: objectives differ in theirs."""
    section, _, key = dotted.partition(".")
    return hasattr(getattr(config, section, None), key)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The same configuration with {"section.key": value} in place of its own."""
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def _of_run(folder: Path) -> dict[str, Any]:
    """The defaults of a run that goes on from another's product: what the other was trained with."""
    run = folder.parent if folder.name == "pipeline" else folder
    path = run.expanduser() / "config.toml"
    settings = read_toml(path) if path.is_file() else {}
    of_alias = {
        k: v for k, v in ALIAS_DEFAULTS.get(settings.get("teacher.model", ""), {}).items() if k != "data.sources"
    }
    kept = ("data.resolution", "objective.w_min", "objective.w_max")
    # The other methods that know guidance start from a teacher, and no teacher is a run's product.
    is_free = "objective.name" in settings and omega_range(settings) is None
    guidance = {"objective.guidance": "free"} if is_free else {}
    return of_alias | {k: settings[k] for k in kept if k in settings} | guidance


def _known(dotted: str, sections: Mapping[str, type]) -> bool:
    section, _, key = dotted.partition(".")
    return section in sections and key in {f.name for f in dataclasses.fields(sections[section])}


def _closest(dotted: str, sections: Mapping[str, type]) -> str:
    every = [f"{name}.{f.name}" for name, cls in sections.items() for f in dataclasses.fields(cls)]
    # A right key in a wrong section is the commonest slip, initials such as lr the next.
    key = dotted.split(".")[-1]
    near = [k for k in every if k.split(".")[1] == key]
    near = near or [k for k in every if "_" in k and "".join(w[0] for w in k.split(".")[1].split("_")) == key]
    near = near or difflib.get_close_matches(dotted, every, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; sections are {known_sections()}"


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


def _is_positive(text: str) -> bool:
    try:
        return 0.0 < float(text) < math.inf
    except ValueError:
        return False


def _check(config: RunConfig) -> None:
    """Ranges that a type does not show."""
    if (memory := config.run.memory) not in ("auto", "off") and not _is_positive(memory):
        raise UsageError(f"run.memory is {memory!r}; it must be auto, off, or a number of GiB, such as 12")
    positive = {
        "data.resolution": config.data.resolution,
        "data.teacher_steps": config.data.teacher_steps,
        "optim.batch_size": config.optim.batch_size,
        "optim.gradient_accumulation_steps": config.optim.gradient_accumulation_steps,
        "optim.max_train_steps": config.optim.max_train_steps,
        "run.log_every": config.run.log_every,
        "run.checkpoint_every": config.run.checkpoint_every,
        "run.keep_checkpoints": config.run.keep_checkpoints,
        "student.rank": config.student.rank,
    }
    for key, value in positive.items():
        if value < 1:
            raise UsageError(f"{key} is {value}; it must be at least 1")
    if config.student.alpha <= 0:
        raise UsageError(
            f"student.alpha is {config.student.alpha:g}; it must be above 0: the update is scaled by alpha / r"
        )
    if unknown := [part for part in config.teacher.drop or () if part != "safety_checker"]:
        raise UsageError(f"teacher.drop is {unknown[0]!r}; what can be left out is safety_checker")
    if config.data.max_samples is not None and config.data.max_samples < 1:
        raise UsageError(f"data.max_samples is {config.data.max_samples}; it must be at least 1")
    not_negative = {
        "teacher.clip_skip": config.teacher.clip_skip or 0,
        "data.min_size": config.data.min_size,
        "data.cache_limit": config.data.cache_limit,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.adam_eps": config.optim.adam_eps,
        "optim.max_grad_norm": config.optim.max_grad_norm,
        "run.seed": config.run.seed,
        "run.validate_every": config.run.validate_every,
        "run.profile": config.run.profile,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise UsageError(f"{key} is {value}; it must be at least 0")
    if not 0.0 <= config.data.caption_drop <= 1.0:
        raise UsageError(f"data.caption_drop is {config.data.caption_drop}; it must be from 0 to 1")
    below_one = {
        "optim.beta1": config.optim.beta1,
        "optim.beta2": config.optim.beta2,
        "student.dropout": config.student.dropout,
    }
    for key, value in below_one.items():
        if not 0.0 <= value < 1.0:
            raise UsageError(f"{key} is {value}; it must be at least 0 and below 1")
    if getattr(config.objective, "guidance", None) == "free" and not config.data.caption_drop:
        raise UsageError(
            "objective.guidance is free and data.caption_drop 0; drop some captions, such as 0.1, so that the empty prompt, "
            "from which guidance pulls away, is trained too"
        )
    if not config.data.sources:
        raise UsageError("data.sources is empty; name a folder, shards, or teacher")
    if config.data.prompts is not None and "teacher" not in config.data.sources:
        named = ", ".join(config.data.sources)
        raise UsageError(f"--prompts is what --data teacher draws, and the data are {named}; add --data teacher")
