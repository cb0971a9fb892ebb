"""The bundled emoji as a source."""

from collections.abc import Iterator
from importlib.resources import files

from lcmdistill.data.sources.base import Member
from lcmdistill.data.sources.webdataset import shards


def bundled(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """The emoji that the tiny teacher was trained on, as shards inside the package."""
    return shards(str(files("lcmdistill") / "assets" / "tiny-data"), prompts, seed)
