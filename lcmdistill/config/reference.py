"""What help texts, config.toml and the settings guide state of each setting: its docstring and its real defaults. No torch."""

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from lcmdistill.config.defaults import ALIAS_DEFAULTS, LORA_ALIAS_DEFAULTS, LORA_DEFAULTS
from lcmdistill.config.docs import FieldDoc, field_docs
from lcmdistill.config.schema import SECTIONS, RunConfig

OBJECTIVE_DOC = "Distillation method."


def setting_doc(key: str, objectives: Mapping[str, str]) -> str:
    """Return the docstring of "section.key".

    Args:
        key: The setting.
        objectives: {name: "package.module:Class"} of the objectives, whose fields the [objective] section has.
    """
    section, _, name = key.partition(".")
    if key == "objective.name":
        return OBJECTIVE_DOC
    if section != "objective":
        return field_docs(f"{RunConfig.__module__}:{SECTIONS[section].__name__}")[name].doc
    owners = _owners(name, objectives)
    scope = "" if len(owners) == len(objectives) else f"{', '.join(owners)}: "
    return scope + next(iter(owners.values())).doc


def default_text(key: str, objectives: Mapping[str, str], kind: str = "full") -> str | None:
    """Return the default of "section.key" and its exceptions, "1e-6; tiny: 1e-4"; None if there is nothing to state.

    Args:
        key: The setting.
        objectives: As in `setting_doc`.
        kind: "full" for the defaults of distill, "lora" for those of distill-lora.
    """
    section, _, name = key.partition(".")
    if key == "objective.name":
        return RunConfig.objective_name
    if section == "objective":
        owners = _owners(name, objectives)
        values = {owner: value_text(doc.default) for owner, doc in owners.items()}
        return _with_exceptions(next(iter(values.values())), values)
    field = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
    if "unset" in field.metadata:
        return field.metadata["unset"]
    is_lora = kind == "lora"
    usual = {key: field.default, **(LORA_DEFAULTS if is_lora else {})}[key]
    values = {}
    for alias, defaults in ALIAS_DEFAULTS.items():
        lora = {**LORA_DEFAULTS, **LORA_ALIAS_DEFAULTS.get(alias, {})} if is_lora else {}
        values[alias] = value_text({key: field.default, **defaults, **lora}[key])
    return _with_exceptions(value_text(usual), values) if usual is not None else None


def help_text(key: str, objectives: Mapping[str, str], kind: str = "full") -> str:
    """Return the `--help` text of a setting: its docstring and its default."""
    default = default_text(key, objectives, kind)
    return setting_doc(key, objectives) + (f"  [default: {default}]" if default and default != "false" else "")


def settings_table(objectives: Mapping[str, str]) -> str:
    """Return all settings as Markdown tables, one per section."""
    parts = []
    for section in ("teacher", "student", "objective", "data", "optim", "run"):
        rows = ["| Setting | Default | Description |", "|---|---|---|"]
        for key in setting_keys(section, objectives):
            default = (default_text(key, objectives) or "").replace("|", "\\|")
            rows.append(f"| `{key}` | {default} | {setting_doc(key, objectives)} |")
        parts.append("\n".join([f"## [{section}]", "", *rows]))
    return "\n\n".join(parts) + "\n"


def setting_keys(section: str, objectives: Mapping[str, str]) -> list[str]:
    """Return the keys of a section, "section.key"; of [objective] those of every objective."""
    if section != "objective":
        return [f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])]
    names = dict.fromkeys(name for location in objectives.values() for name in field_docs(location))
    return ["objective.name", *(f"objective.{name}" for name in names)]


def value_text(value: Any) -> str:
    """Return a default as a person would type it: "1e-6", "64", "on"."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        short = f"{float(mantissa):g}e{int(exponent)}"
        return short if 0 < abs(value) < 1e-2 else f"{value:g}"
    return str(value) if value is not None and not isinstance(value, StrEnum) else (value or "none")


def _owners(name: str, objectives: Mapping[str, str]) -> dict[str, FieldDoc]:
    """Return the objectives that have a field, with what each states of it."""
    docs = {objective: field_docs(location) for objective, location in objectives.items()}
    return {objective: fields[name] for objective, fields in docs.items() if name in fields}


def _with_exceptions(usual: str, values: Mapping[str, str]) -> str:
    others = ", ".join(f"{name}: {value}" for name, value in values.items() if value != usual)
    return f"{usual}; {others}" if others else usual
