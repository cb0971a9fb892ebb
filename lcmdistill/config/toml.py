"""Configurations as TOML and as flat `{"section.key": value}` mappings."""

import dataclasses
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from lcmdistill.config.reference import setting_doc
from lcmdistill.config.schema import SECTIONS, RunConfig, known_sections
from lcmdistill.utils.checksums import checksum_of_text
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.limited import read_limited

_LARGEST = 2**24
"bytes of a config file; what has more is a device or another file"

CHECKSUM_LINE = "# checksum: "
"the start of the last line of a run's config.toml"

ANY_CHECKSUM = "any"
"what a user writes there to accept a file that was edited"


def read_toml(path: Path) -> dict[str, Any]:
    """Return a config file as {"section.key": value}.

    Raises:
        UsageError: The file is absent, is not TOML, or nests its sections.
    """
    try:
        tree = tomllib.loads(read_limited(path, _LARGEST).decode("utf-8-sig"))  # Windows editors write the mark
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror}); specify an existing TOML file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {section!r} is outside a section; sections are {known_sections()}")
        for key, value in values.items():
            if isinstance(value, dict):
                raise UsageError(f"{path}: [{section}.{key}] is a table in a table; sections are not nested")
            flat[f"{section}.{key}"] = value
    return flat


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as {"section.key": plain value}, without the keys that are None."""
    flat: dict[str, Any] = {"objective.name": str(config.objective_name)}
    for section in ("objective", *SECTIONS):
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if value is not None:
                flat[f"{section}.{key}"] = str(value) if isinstance(value, StrEnum) else value
    return flat


def to_toml(config: RunConfig) -> str:
    """Return the configuration as TOML that `--config` reads back to the same tree, each setting under its description.

    The last line is a checksum, by which a run's file shows whether it is whole.
    """
    import tomli_w

    location = f"{type(config.objective).__module__}:{type(config.objective).__qualname__}"
    objectives, lines, section = {config.objective_name: location}, [], ""
    for dotted, value in _sorted_sections(flatten(config)).items():
        name, _, key = dotted.partition(".")
        if name != section:
            lines.append(f"{chr(10) * bool(section)}[{name}]")
            section = name
        lines.append(f"# {setting_doc(dotted, objectives)}")
        lines.append(tomli_w.dumps({key: list(value) if isinstance(value, tuple) else value}).rstrip())
    text = "\n".join(lines) + "\n"
    return f"{text}{CHECKSUM_LINE}{checksum_of_text(text)}\n"


def _sorted_sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of [teacher], [student] and [objective] first."""
    first = ("teacher", "student", "objective")
    sections = dict.fromkeys((*first, *(dotted.partition(".")[0] for dotted in settings)))
    return {k: v for section in sections for k, v in settings.items() if k.startswith(f"{section}.")}


def settings_to_toml(settings: Mapping[str, Any]) -> str:
    """Return settings, {"section.key": value}, as TOML without descriptions."""
    import tomli_w

    tree: dict[str, dict[str, Any]] = {}
    for dotted, value in _sorted_sections(settings).items():
        section, _, key = dotted.partition(".")
        tree.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    return tomli_w.dumps(tree)
