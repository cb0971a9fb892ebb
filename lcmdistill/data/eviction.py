"""The cache's size limit: what no run has used for longest is removed first.

Only what this program made is ever removed. It must have a name that the program gives, and it must carry the program's
mark: a marker file in a folder, the program's own metadata in a tensor file. Files with other names in a marked folder stay.
"""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lcmdistill.data.chunks import is_ours
from lcmdistill.utils.errors import RunError

logger = logging.getLogger(__name__)

MARKER = ".made-by-lcmdistill"
"an empty file in each folder of the cache that may be removed"

_DIGEST = "[0-9a-f]{24}"

_ENTRIES = {
    "latents": _DIGEST,
    "teacher-outputs": _DIGEST,
    "evaluation": rf"(?:validation-|trajectory-)?{_DIGEST}\.safetensors|beginning-{_DIGEST}",
}
"folders of a cache, and the names of their entries; each entry serves some runs and can be made again"

KINDS = ("latents", "teacher outputs", "evaluation")
"what the entries hold"

_KIND_OF = dict(zip(_ENTRIES, KINDS, strict=True))

_OWN_FILE = re.compile(r"\d[\w-]*(?:\.\w+)?\.(?:safetensors|part)|\.\d[\w-]*\..+|whole-(?:all|\d+)")
"names of this program's files in a folder besides the marker: chunks, what interrupted ones left, and marks of whole sets"

_DOOMED = ".{}.old"
"the name of an entry whose removal has started"


def claim_folder(folder: Path) -> Path:
    """Make a folder of the cache, marked as one that may be removed and as used now, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    os.utime(folder)
    return folder


def evict_lru(root: Path, limit: float, needed: Iterable[Path]) -> int:
    """Mark the needed entries as used, and remove others, the longest unused first, until all take `limit` bytes.

    A run that still reads a removed entry continues: its files are mapped, and the system keeps them until it ends. A run
    that still fills it ends with `cache_evicted_error`.

    Args:
        root: The cache.
        limit: How many bytes the entries may take.
        needed: Entries that are not removed.

    Returns:
        How many bytes were removed.
    """
    _report_unmarked(root)
    protected = {path.resolve() for path in needed}
    for path in protected:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(path)
    times = {path: time for path in _entries(root) if (time := _last_used(path)) is not None}
    sizes = {path: _size(path) for path in times}
    total, removed = sum(sizes.values()), 0
    for path in sorted(times, key=times.__getitem__):
        if total - removed <= limit:
            break
        if path.resolve() not in protected and _remove(path):
            removed += sizes[path]
    if removed:
        logger.info(f"{root}: removed {removed / 1e9:.1f} GB, the least recently used (data.cache_limit)")
    return removed


@dataclass(frozen=True)
class CacheEntry:
    """One entry of a cache: its path, what it holds (a key of KINDS), its bytes, and when a run last used it."""

    path: Path
    kind: str
    size: int
    last_used: float


def cache_entries(root: Path) -> list[CacheEntry]:
    """Return what this program made in a cache, the least recently used first."""
    entries = [
        CacheEntry(path, _KIND_OF[path.parent.name], _size(path), time)
        for path in _entries(root)
        if (time := _last_used(path)) is not None
    ]
    return sorted(entries, key=lambda entry: entry.last_used)


def remove_entries(entries: Iterable[CacheEntry]) -> int:
    """Remove entries of a cache, and return how many bytes that freed."""
    return sum(entry.size for entry in entries if _remove(entry.path))


def cache_evicted_error(folder: Path) -> RunError:
    """Return the error for a folder that is no longer whole although this run has just filled it."""
    return RunError(
        f"{folder}: cache files were deleted while this run filled it, by another run's eviction or by hand; "
        "raise data.cache_limit, and run the same command again"
    )


def _report_unmarked(root: Path) -> None:
    """Log folders that an earlier version of this program filled: without the marker nothing shows whose they are."""
    folders = (
        path for kind in _ENTRIES for path in sorted((root / kind).glob("*")) if re.fullmatch(_DIGEST, path.name)
    )
    unmarked = [path for path in folders if not (path / MARKER).exists() and any(map(is_ours, _first_chunk(path)))]
    if unmarked:
        logger.warning(
            f"{root}: {len(unmarked)} cache folders of an earlier version take {sum(map(_size, unmarked)) / 1e9:.1f} GB, and "
            f"data.cache_limit does not apply to them; delete them if they are not needed, such as {unmarked[0]}"
        )


def _first_chunk(folder: Path) -> Iterator[Path]:
    return itertools.islice(folder.glob("[0-9]*.safetensors"), 1)


def _entries(root: Path) -> Iterator[Path]:
    """Yield what this program made in a cache."""
    for kind, pattern in _ENTRIES.items():
        name = re.compile(rf"(?:{pattern})|{re.escape(_DOOMED).replace(re.escape('{}'), f'(?:{pattern})')}")
        for path in sorted((root / kind).glob("*")):
            if not name.fullmatch(path.name) or path.is_symlink():
                continue
            if (path / MARKER).is_file() if path.is_dir() else is_ours(path):
                yield path


def _remove(path: Path) -> bool:
    """Remove an entry, and return whether it was still there."""
    try:
        if not path.is_dir():
            path.unlink()
            return True
        foreign = [file.name for file in path.iterdir() if not _is_own(file)]
        doomed = path
        if not foreign:
            # Renamed first: a removal that is cut off must not leave something that looks whole.
            name = path.name if path.name.startswith(".") else _DOOMED.format(path.name)
            doomed = path.rename(path.with_name(name))
    except FileNotFoundError:  # another run has just removed it
        return False
    except OSError as error:  # such as an entry of another user in a shared cache
        logger.warning(f"{path} cannot be removed ({error.strerror}); it still counts for data.cache_limit")
        return False
    if foreign:
        logger.warning(f"{path} contains files that this program did not write, such as {min(foreign)}; they are kept")
    # The marks of whole sets go first, and the marker last: what is left of an interrupted removal can be removed later.
    for file in sorted(filter(_is_own, doomed.iterdir()), key=_order_of_removal):
        with contextlib.suppress(OSError):
            file.unlink()
    with contextlib.suppress(OSError):
        doomed.rmdir()
    return True


def _is_own(file: Path) -> bool:
    """Return whether a file in a folder of the cache has a name that this program gives."""
    return (file.name == MARKER or _OWN_FILE.fullmatch(file.name) is not None) and not file.is_dir()


def _order_of_removal(file: Path) -> tuple[bool, bool]:
    return file.name == MARKER, not file.name.startswith("whole-")


def _last_used(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files; another run may be renaming one, or removing all."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in filter(_is_own, path.iterdir()) if path.is_dir() else [path]:
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size
    return total
