"""Write files and folders that are either complete or absent: write under a temporary name, then rename."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The umask can only be read by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)

flush = os.fsync
"makes the disk hold what was written to a file descriptor"

PARTIAL, REPLACED = "partial", "old"
"suffixes of hidden siblings: a folder that is being written, and the one that it replaces"


def hidden_sibling(path: Path, suffix: str) -> Path:
    """Return the hidden path next to `path` that a write of it uses, such as `.best.old`."""
    return path.with_name(f".{path.name}.{suffix}")


@contextmanager
def atomic_dir(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `destination` once the block ends without an error.

    The replacement takes two renames. `restore_replaced` repairs the state that a process killed between them leaves.
    """
    restore_replaced(destination)
    partial, replaced = hidden_sibling(destination, PARTIAL), hidden_sibling(destination, REPLACED)
    remove_folder(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
            elif path.is_dir():
                _sync_folder(path)
        _sync_folder(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove_folder(replaced, ignore_errors=True)
    if destination.exists():
        destination.rename(replaced)
    partial.rename(destination)
    _sync_folder(destination.parent)
    remove_folder(replaced, ignore_errors=True)


def remove_folder(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder. Of a link to one, such as to a larger disk, only the link is removed."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def restore_replaced(destination: Path) -> None:
    """Rename the replaced folder back if `destination` is missing: a process was killed while it swapped the two."""
    replaced = hidden_sibling(destination, REPLACED)
    if replaced.is_dir() and not destination.exists():
        replaced.rename(destination)


@contextmanager
def atomic_file(destination: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which replaces `destination` once the block ends without an error.

    The path keeps the suffix of `destination`, because some libraries choose a format by it.

    Args:
        destination: The file to write.
        shared: Whether other processes may write the same file at the same time. The last one wins. The temporary name
            then has no suffix, so that no process mistakes it for a complete file.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.stem}.{PARTIAL}{destination.suffix}")
    if shared:
        prefix = f".{destination.name}.{socket.gethostname()}-"
        _remove_leftovers(destination.parent, prefix)
        partial = destination.with_name(f"{prefix}{os.getpid()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(destination)
        _sync_folder(destination.parent)
    finally:
        partial.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed processes of this machine left of a shared file: their ids follow the prefix."""
    for name in os.listdir(folder):
        process = name.removeprefix(prefix)
        if process != name and process.isdecimal() and not _is_alive(int(process)):
            (folder / name).unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Return whether a process of this machine may be running."""
    if os.name != "posix":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a small text file atomically. `shared` has the meaning it has for `atomic_file`."""
    with atomic_file(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Flush a file to the disk, with the mode of any other new file: safetensors makes its files private."""
    path.chmod(0o666 & ~_UMASK)
    with path.open("rb") as handle:
        flush(handle.fileno())


def _sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk: until then a power cut can undo a rename in it."""
    if os.name != "posix":  # Windows opens no folders, and writes names through
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)
