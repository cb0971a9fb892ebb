"""Sources: each turns what the user named into a stream of members, in an order that never changes.

A member may be broken; nothing is decoded or judged here. What a shard's reader itself trips over is yielded as a member
with a `problem`, so that it can be counted.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lcmdistill.data.sources.base import IMAGE_SUFFIXES, TAR_SUFFIXES, Member
from lcmdistill.data.sources.bundled import bundled
from lcmdistill.data.sources.image_folder import _folder_entries, folder
from lcmdistill.data.sources.remote import REMOTE
from lcmdistill.data.sources.teacher import read_prompts, teacher
from lcmdistill.data.sources.webdataset import shards
from lcmdistill.utils.errors import RunError, UsageError

# How --data is read: kind -> (spec, prompts file, seed of the order) -> members.
SOURCES: dict[str, Callable[[str, str | None, int | None], Iterator[Member]]] = {
    "teacher": teacher,
    "tiny": bundled,
    "shards": shards,
    "folder": folder,
}


def kind_of(spec: str) -> str:
    """Which of SOURCES reads a --data argument. Raises UsageError if none can."""
    if spec in ("teacher", "tiny"):
        return spec
    path = Path(spec).expanduser()
    if path.is_dir():
        names = [p.name for p in path.iterdir()]
        if any(name.endswith(TAR_SUFFIXES) for name in names):
            return "shards"
        if any(name.startswith("metadata.") for name in names) or any(
            p.suffix.lower() in IMAGE_SUFFIXES for p in path.rglob("*")
        ):
            return "folder"
        raise UsageError(f"--data {spec} holds neither images nor .tar shards")
    if spec.startswith(REMOTE):
        return "shards"
    if re.match(r"[a-z][a-z0-9+.-]*://", spec):
        raise UsageError(
            f"--data {spec}: unknown scheme; shards come from files, http(s)://, gs://, hf://, or from a command's output, "
            "such as 'pipe:aws s3 cp s3://BUCKET/KEY.tar -'"
        )
    if "*" in spec and not path.exists():
        raise UsageError(
            f"--data {spec}: wildcards are not expanded; name the folder, or use braces, such as shards/{{00..99}}.tar"
        )
    if spec.endswith(TAR_SUFFIXES):
        return "shards"
    if path.exists():
        raise UsageError(f"--data {spec} is neither a folder nor a .tar shard")
    raise UsageError(
        f"--data {spec} does not exist; give a folder of images, .tar shards, tiny, or teacher for no data"
    )


def open_source(spec: str, prompts: str | None, seed: int | None = None) -> Iterator[Member]:
    """The members of one --data argument. Errors of the transport become RunError.

    seed: decides the order of an image folder's members, which is that of their names without one. Shards are read, and
    prompts drawn, in the order they have.
    """
    try:
        yield from SOURCES[kind_of(spec)](spec, prompts, seed)
    except (OSError, EOFError) as error:
        raise RunError(f"--data {spec} cannot be read: {error}") from error


def listed(spec: str, prompts: str | None) -> int | None:
    """How many members a source has, where its listing tells; None for shards, which would have to be read."""
    kind = kind_of(spec)
    if kind == "teacher":
        return len(read_prompts(prompts))
    return len(_folder_entries(Path(spec).expanduser())) if kind == "folder" else None
