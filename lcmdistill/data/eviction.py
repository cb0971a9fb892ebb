"""The cache's bound: what no run has used for longest makes room."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lcmdistill.utils.errors import RunError

logger = logging.getLogger(__name__)


KINDS = ("latents", "answers")
"the folders of a cache whose sub-folders each serve some runs, and can be made again"


def evict_lru(root: Path, limit: float, needed: Iterable[Path]) -> int:
    """Note that the needed folders are used, and remove others, the longest unused first, until all take `limit` bytes.

    Returns how many bytes were removed. A run that still reads a removed one goes on: its files are mapped, and the system
    keeps them until it ends. One that still fills it ends with `emptied`.
    """
    kept = {path.resolve() for path in needed}
    for path in kept:
        os.utime(path)
    folders = [path for kind in KINDS for path in (root / kind).glob("[0-9a-f]*") if path.is_dir()]
    sizes = {path: _size(path) for path in folders}
    total, removed = sum(sizes.values()), 0
    for path in sorted(folders, key=lambda path: path.stat().st_mtime):
        if total - removed <= limit:
            break
        if path.resolve() in kept:
            continue
        # Renamed first: a removal that is cut off must not leave something that looks whole.
        try:
            doomed = path.rename(path.with_name(f".{path.name}.old"))
        except FileNotFoundError:  # another run has just removed it
            continue
        shutil.rmtree(doomed, ignore_errors=True)
        removed += sizes[path]
    if removed:
        logger.info(f"{root}: {removed / 1e9:.1f} GB that no run had used for longest were removed (data.cache_limit)")
    return removed


def cache_evicted_error(folder: Path) -> RunError:
    """What a run says that finds a folder no longer whole that it has just filled."""
    return RunError(
        f"{folder}: files of this cache were removed while this run filled it, by another run that made room or by hand; "
        "raise data.cache_limit, and the same command makes what is missing"
    )


def _size(folder: Path) -> int:
    """The bytes of a folder's files, of which another run may just be renaming one, or removing all."""
    total = 0
    try:
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size
    except FileNotFoundError:
        return 0
    return total
