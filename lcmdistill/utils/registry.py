"""Registries that name their members without importing them: `--help` lists the keys and needs no torch."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any


class LazyRegistry(Mapping[str, Any]):
    """A mapping of keys to objects that are imported on first access.

    Args:
        members: {key: "package.module:name"}, in the order that messages and `--help` list them.
    """

    def __init__(self, members: Mapping[str, str]) -> None:
        self._members = dict(members)

    def __getitem__(self, key: str) -> Any:
        module, _, name = self._members[key].partition(":")
        return getattr(import_module(module), name)

    @property
    def locations(self) -> dict[str, str]:
        """{key: "package.module:name"}, for readers of the source that import nothing."""
        return dict(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
