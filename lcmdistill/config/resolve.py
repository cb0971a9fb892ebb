"""Resolve the configuration, one frozen tree, from defaults < preset < file < flags. No torch, so that --help is instant."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.config.build import build_section, choose, is_known
from lcmdistill.config.defaults import ALIAS_DEFAULTS, LORA_ALIAS_DEFAULTS, LORA_DEFAULTS
from lcmdistill.config.guidance import omega_range
from lcmdistill.config.lora_words import split_lora
from lcmdistill.config.presets import PRESETS
from lcmdistill.config.recorded import RENAMED, read_run_config
from lcmdistill.config.schema import MOST, SECTIONS, RunConfig, TeacherConfig, known_sections
from lcmdistill.config.synonyms import setting_meant
from lcmdistill.config.toml import flatten
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.redact import redact_word


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse a --set argument, `section.key=value`. The value is TOML if it parses, otherwise a string."""
    key, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"--set {text!r} is not of the form section.key=value, such as optim.learning_rate=1e-5")
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except ValueError:  # not TOML, or a number of thousands of digits
        return key.strip(), value.strip()


def resolve(
    file: Mapping[str, Any], flags: Mapping[str, Any], preset: str | None = None, *, objectives: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration from defaults < the teacher's defaults < preset < file < flags, with every key checked.

    Args:
        file: {"section.key": value} of a config file.
        flags: {"section.key": value} of the command line.
        preset: A key of PRESETS.
        objectives: {name: class}; the registry of a higher layer.

    Raises:
        UsageError: A key is unknown, or a value is not allowed.
    """
    chosen = {**file, **flags}
    name = choose("objective.name", str(chosen.pop("objective.name", RunConfig.objective_name)), tuple(objectives))
    sections, info = {**SECTIONS, "objective": objectives[name]}, objectives[name].info
    model, is_lora = str(chosen.get("teacher.model", TeacherConfig().model)), chosen.get("student.kind") == "lora"
    defaults = {**info.defaults, **ALIAS_DEFAULTS.get(model, {})}
    if is_lora:
        defaults |= {**LORA_DEFAULTS, **info.defaults, **info.lora_defaults, **LORA_ALIAS_DEFAULTS.get(model, {})}
    defaults |= info.alias_defaults.get(model, {})
    defaults |= _defaults_of_run(Path(model), objectives)
    if {**defaults, **chosen}.get("objective.guidance") == "free":
        defaults |= info.free_guidance_defaults
    defaults = {**defaults, **_preset_values(preset, "lora" if is_lora else "full")}
    values = {**{k: v for k, v in defaults.items() if v is not None and is_known(k, sections)}, **chosen}
    if isinstance(memory := values.get("run.memory"), str):
        values["run.memory"] = _in_gib(memory)
    built = {section: build_section(section, cls, values) for section, cls in sections.items()}
    unknown = [key for key in values if not is_known(key, sections)]
    if unknown:
        section, _, key = unknown[0].partition(".")
        if section == "objective" and any(key in {f.name for f in dataclasses.fields(o)} for o in objectives.values()):
            known = ", ".join(f.name for f in dataclasses.fields(objectives[name]))
            raise UsageError(f"objective.{key} is not a setting of {name}, which has {known}")
        if unknown[0] in RENAMED:
            raise UsageError(f"{unknown[0]} is now called {RENAMED[unknown[0]]}; rename it")
        raise UsageError(f"unknown setting {unknown[0]!r}{_closest(unknown[0], sections)}")
    config = RunConfig(objective_name=name, chosen=frozenset(values), explicit=frozenset(chosen), **built)
    if config.run.output is None:
        output = (
            Path("runs")
            / f"{Path(model).name.removesuffix('.safetensors') or 'run'}-{name}{'-lora' if is_lora else ''}"
        )
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output=str(output)))
    if "data.sources" not in flags and any(spec.startswith("pipe:") for spec in config.data.sources):
        raise UsageError("data.sources: a shell command (pipe:...) is not taken from a file; pass it as --data")
    if config.teacher.allow_pickle and "teacher.allow_pickle" not in flags:
        raise UsageError(
            "teacher.allow_pickle opens files that can run any code and is not taken from a file; add --set "
            "teacher.allow_pickle=true if you trust the teacher's author"
        )
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
    """Return how a preset differs from the defaults of the same teacher, objective and command: "key: old -> new"."""
    model = {k: v for k, v in flags.items() if k in ("teacher.model", "objective.name", "student.kind")}
    usual, preset_values = (flatten(resolve({}, model, each, objectives=objectives)) for each in (None, preset))
    return [f"{key}: {usual.get(key)} -> {value}" for key, value in preset_values.items() if usual.get(key) != value]


def has_key(config: RunConfig, dotted: str) -> bool:
    """Return whether "section.key" is a setting of this run; objectives have different ones."""
    section, _, key = dotted.partition(".")
    return hasattr(getattr(config, section, None), key)


def keys_with(config: RunConfig, declared: str) -> set[str]:
    """Return the settings whose fields declare a property, such as "mutable_on_resume"; see `schema.setting`."""
    keys = {
        f"{section}.{field.name}"
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
        if field.metadata.get(declared)
    }
    return keys | {f"objective.{name}" for name in getattr(config.objective.info, declared, ())}


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with other values of some settings, {"section.key": value}."""
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def _defaults_of_run(folder: Path, objectives: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a run that starts from another run's student: what the other run was trained with."""
    run = folder.parent if folder.name == "pipeline" else folder
    config = read_run_config(run.expanduser(), objectives)
    if config is None:
        return {}
    alias = {k: v for k, v in ALIAS_DEFAULTS.get(config.teacher.model, {}).items() if k != "data.sources"}
    inherited = ("data.resolution", "objective.w_min", "objective.w_max")
    recorded = {key: value for key, value in flatten(config).items() if key in inherited}
    # Other methods with guidance start from a teacher, and a run's student is not a teacher.
    return alias | recorded | ({"objective.guidance": "free"} if omega_range(config) is None else {})


def _closest(dotted: str, sections: Mapping[str, type]) -> str:
    keys = [f"{name}.{f.name}" for name, cls in sections.items() for f in dataclasses.fields(cls)]
    meant = setting_meant(dotted, keys)
    return f"; did you mean {meant!r}?" if meant else f"; sections are {known_sections()}"


def _in_gib(memory: str) -> str:
    """Return a value of run.memory without its unit: 12GB, 12 GiB, 12g and 12288MB are 12."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([gm])i?b?\s*", memory, flags=re.IGNORECASE)
    if not match or not _is_positive(match[1]):
        return memory
    return match[1] if match[2] in "gG" else f"{float(match[1]) / 1024:g}"


def _is_positive(text: str) -> bool:
    try:
        return 0.0 < float(text) < math.inf
    except ValueError:
        return False


def _check_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> None:
    least, most, below = (bounds.get(name) for name in ("least", "most", "below"))
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int) and most is None and abs(value) > MOST:
        raise UsageError(f"{key} is {value}; it must be at most {MOST}")
    if least is None:
        return
    if value < least or (most is not None and value > most) or (below is not None and value >= below):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{key} is {value}; it must be {allowed}{f' and below {below}' if below is not None else ''}")


def _check(config: RunConfig) -> None:
    """Check what the types do not express."""
    for name, value in vars(config.objective).items():
        _check_bounds(f"objective.{name}", value, {})
    if (memory := config.run.memory) not in ("auto", "off") and not _is_positive(memory):
        raise UsageError(f"run.memory is {memory!r}; it must be auto, off, or a number of GiB, such as 12")
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            _check_bounds(f"{section}.{field.name}", getattr(getattr(config, section), field.name), field.metadata)
    if config.student.alpha <= 0:
        raise UsageError(
            f"student.alpha is {config.student.alpha:g}; it must be above 0: the update is scaled by alpha / r"
        )
    can_drop = ("safety_checker", "text_encoder_3")
    if unknown := [part for part in config.teacher.drop or () if part not in can_drop]:
        raise UsageError(f"teacher.drop is {unknown[0]!r}; only {' and '.join(can_drop)} can be dropped")
    if getattr(config.objective, "guidance", None) == "free" and not config.data.caption_drop:
        raise UsageError(
            "objective.guidance is free and data.caption_drop is 0; set it to 0.1, for example, because guidance needs the "
            "empty prompt to be trained too"
        )
    for word in config.teacher.loras or ():
        split_lora(word)
    if config.student.lora_relative_to == "base" and not config.teacher.loras:
        raise UsageError(
            "student.lora_relative_to is base, but the teacher has no LoRAs; remove it, or pass --teacher-lora"
        )
    if config.teacher.lora_checksums and not config.teacher.loras:
        raise UsageError(
            "teacher.lora_checksums is set, but the teacher has no LoRAs; remove it, or pass --teacher-lora"
        )
    if not config.data.sources:
        raise UsageError("data.sources is empty; specify a folder, shards, or teacher")
    if config.data.prompts is not None and "teacher" not in config.data.sources:
        named = ", ".join(map(redact_word, config.data.sources))
        raise UsageError(f"--prompts is for --data teacher, and the data are {named}; add --data teacher")
