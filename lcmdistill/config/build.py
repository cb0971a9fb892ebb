"""Build a section of the configuration from plain values, checked field by field."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, Union

from lcmdistill.utils.errors import UsageError


def is_known(dotted: str, sections: Mapping[str, type]) -> bool:
    """Return whether "section.key" is a setting of one of the sections, {name: dataclass}."""
    section, _, key = dotted.partition(".")
    return section in sections and key in {f.name for f in dataclasses.fields(sections[section])}


def build_section(section: str, cls: type, values: Mapping[str, Any]) -> Any:
    """Return a section's dataclass with the values that {"section.key": value} has for it, and defaults for the rest.

    Raises:
        UsageError: A value is not of its field's type; the message states what is allowed.
    """
    hints = typing.get_type_hints(cls)
    chosen = {
        f.name: coerce(f"{section}.{f.name}", values[f"{section}.{f.name}"], hints[f.name])
        for f in dataclasses.fields(cls)
        if f"{section}.{f.name}" in values
    }
    return cls(**chosen)


def choose(key: str, value: Any, choices: Collection[Any]) -> Any:
    """Return the value if it is one of the choices.

    Raises:
        UsageError: It is not; the message lists the choices.
    """
    if value in choices:
        return value
    raise UsageError(f"{key} is {value!r}; choose from {', '.join(map(str, choices))}")


def coerce(key: str, value: Any, hint: Any) -> Any:
    """Return a value as the field's type.

    Args:
        key: "section.key", for messages.
        value: A value from TOML or from the command line.
        hint: The field's type.

    Raises:
        UsageError: The value is not of that type; the message states what is allowed.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        return coerce(key, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        return choose(key, value, args)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, Sequence) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise UsageError(f"{key} is {value!r}; it must be a list of strings")
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(choose(key, str(value), [str(member) for member in hint]))
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
