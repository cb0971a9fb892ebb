"""Paths inside a run folder, and the lock that keeps a second run out of it."""

import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lcmdistill.utils.checksums import verify_checksums
from lcmdistill.utils.errors import UsageError, disk_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"

_APPENDED = ("log.txt", "metrics.jsonl")
"the files that are written in place; as links in a folder of somebody else they would change any file of the user"


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints under a folder, oldest first. Folders with other names are ignored."""
    saved = [path for path in folder.glob("step-*") if _is_checkpoint(path)]
    return sorted(saved, key=checkpoint_step)


def _is_checkpoint(path: Path) -> bool:
    digits = path.name.removeprefix("step-")
    return digits.isdecimal() and path.name == step_name(int(digits)) and (path / "state.pt").is_file()


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step that a checkpoint was saved at."""
    return int(path.name.removeprefix("step-"))


def looks_like_run(folder: Path) -> bool:
    """Return whether a folder has files that a run writes besides its configuration."""
    names = (".data.json", "metrics.jsonl", "pipeline/model_index.json")
    return any((folder / name).is_file() for name in names) or bool(checkpoints(folder / "checkpoints"))


def lora_file(run: Path) -> Path:
    """Return the LoRA file of a run.

    Raises:
        UsageError: There is no LoRA yet, there are several, or it is damaged.
    """
    verify_checksums(run / "lora")
    files = [path for path in sorted((run / "lora").glob("*.safetensors")) if not path.name.startswith(".")]
    if not files:
        raise UsageError(f"the run {run} has no lora/ yet; run its distill-lora command again to finish it")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UsageError(
            f"{run / 'lora'} contains {len(files)} LoRAs ({names}), but a run writes one; move the others away"
        )
    return files[0]


def check_writable(path: Path) -> None:
    """Raise UsageError unless a file or folder can be created at `path`. It is tried, because permissions do not tell."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UsageError(f"--output {path} is a URL; specify a folder or file of this machine")
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not parent.is_dir():
        raise UsageError(f"--output {path} cannot be created: {parent} is a file; choose another place")
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".lcmdistill-"):
            pass
    except OSError as error:
        reason = "no permission" if isinstance(error, PermissionError) else error.strerror
        if disk_error(error):
            raise
        raise UsageError(f"--output {path} is not writable: {reason} in {parent}; choose another place") from error


def free_space(folder: Path) -> tuple[int, float]:
    """Return the number of the disk that a folder is on, or will be on, and the bytes that are free there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return os.stat(existing).st_dev, float(shutil.disk_usage(existing).free)


def is_in_use(folder: Path) -> bool:
    """Return whether a run holds the lock of a folder. On a file system without locks it is never known."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if needed. For the main process, for as long as the run lives.

    The lock ends with the process, however it ends. A folder that is still empty at the end is removed again.

    Raises:
        UsageError: Another run holds the lock.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    for name in (LOCK, *_APPENDED):
        if (folder / name).is_symlink():
            raise UsageError(f"{folder / name} is a link, and a run writes no file through one; remove it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            held = False
        except OSError as error:  # a file system without locks
            logger.debug(f"{path}: no lock ({error.strerror}); a second run in this folder will not be noticed")
            held = True
        if not held:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise UsageError(
                f"--output {folder} is in use by another run{f' ({holder})' if holder else ''}; wait until it ends, "
                "or choose another folder"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # if empty
    finally:
        os.close(descriptor)
