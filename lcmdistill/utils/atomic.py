"""Files and folders that are either whole or absent: written to a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# There is no other way to ask for it.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_dir(destination: Path) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `destination` once the block ends without an error."""
    aside = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                _sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    old = destination.with_name(f".{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    aside.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path, *, shared: bool = False) -> Iterator[Path]:
    """The same for one file: a path to write to, with the destination's ending, by which some programs go.

    shared: other processes may write the same file at the same time, whose last one stays; without the ending, so that
    nobody takes another's for a whole one.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    name = f".{destination.name}.{os.getpid()}" if shared else f".{destination.stem}.partial{destination.suffix}"
    aside = destination.with_name(name)
    try:
        yield aside
        _sync(aside)
        aside.replace(destination)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """A small text file, whole or not there. shared: as `atomic_file`."""
    with atomic_file(path, shared=shared) as aside:
        aside.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Onto the disk, and readable for whoever files are here: safetensors leaves its own to their owner alone."""
    path.chmod(0o666 & ~_UMASK)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
