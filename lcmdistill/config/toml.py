"""Configurations as TOML and as flat `{"section.key": value}` mappings."""

import dataclasses
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import SECTIONS, RunConfig, known_sections
from lcmdistill.utils.errors import UsageError


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
            raise UsageError(f"{path}: {section!r} stands outside a section; sections are {known_sections()}")
        for key, value in values.items():
            if isinstance(value, dict):
                raise UsageError(f"{path}: [{section}.{key}] is a table in a table; sections are not nested")
            flat[f"{section}.{key}"] = value
    return flat


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
    return settings_to_toml(flatten(config))


def settings_to_toml(settings: Mapping[str, Any]) -> str:
    """Settings, {"section.key": value}, as TOML."""
    import tomli_w

    tree: dict[str, dict[str, Any]] = {}
    for dotted, value in settings.items():
        section, _, key = dotted.partition(".")
        tree.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    first = [section for section in ("teacher", "student", "objective") if section in tree]
    return tomli_w.dumps({section: tree[section] for section in (*first, *tree)})
