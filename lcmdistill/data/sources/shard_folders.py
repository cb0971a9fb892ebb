"""Which files of a folder are shards, and what lies beside them that nobody reads."""

import logging
from functools import cache
from pathlib import Path

from lcmdistill.data.images import IMAGE_SUFFIXES
from lcmdistill.data.sources.base import TAR_SUFFIXES

logger = logging.getLogger(__name__)

_UNREAD = (*IMAGE_SUFFIXES, ".tar.zst", ".tar.bz2", ".tar.xz", ".tbz2", ".txz", ".zip", ".7z")
"suffixes of images, and of archives that are not read"


def is_shard(name: str) -> bool:
    """Return whether a file's name is that of a shard."""
    return name.lower().endswith(TAR_SUFFIXES)


def shards_in(folder: Path) -> tuple[str, ...]:
    """Return the shards of a folder in the order of their names."""
    return tuple(sorted(str(path) for path in folder.iterdir() if is_shard(path.name)))


@cache
def note_others(folder: Path) -> None:
    """Log once what lies beside a folder's shards and holds samples as well: they would be missing unnoticed."""
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and _is_unread(path))
    if others:
        more = f" and {len(others) - 1} more images, archives or folders" if len(others) > 1 else ""
        logger.warning(
            f"{folder}: only its shards are read, not {others[0]}{more}; pass these as a --data of their own"
        )


def _is_unread(path: Path) -> bool:
    try:
        inside = [each.name for each in path.iterdir()] if path.is_dir() and not is_shard(path.name) else []
    except OSError:
        return True
    return path.name.lower().endswith(_UNREAD) or any(
        is_shard(name) or name.lower().endswith(_UNREAD) for name in inside
    )
