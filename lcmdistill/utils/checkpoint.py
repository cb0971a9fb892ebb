"""Checkpoints as files: `step-N/` holds one safetensors file per group of tensors, and `state.pt` with plain values.

A sharded run's hold the files of `utils/sharded_checkpoint.py` instead of the groups' files.
"""

import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmdistill.utils.atomic import PARTIAL, REPLACED, atomic_dir, hidden_sibling, remove_folder, restore_replaced
from lcmdistill.utils.checksums import checksum
from lcmdistill.utils.errors import RunError
from lcmdistill.utils.run_dir import checkpoint_step, checkpoints, step_name
from lcmdistill.utils.sharded_checkpoint import is_sharded, read_whole, save_state

logger = logging.getLogger(__name__)

BEST = "best"
"the folder, next to the checkpoints, with the weights of the best validation"

REMOVED = "removed"
"suffix of the hidden folder that a checkpoint becomes while it is deleted"

Groups = dict[str, dict[str, Tensor]]


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its folder, its groups of tensors on the CPU, and its state."""

    path: Path
    groups: Groups
    state: dict[str, Any]


def load_best(run: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Return (step, weights) of the best validation, or None if the run has none."""
    path = run / "checkpoints" / BEST
    restore_replaced(path)
    if not (path / "state.pt").is_file():
        return None
    groups, state = load_checkpoint(path)
    return state["step"], groups["weights"]


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    name: str | None = None,
) -> Path:
    """Write a checkpoint atomically, and return its folder.

    Args:
        folder: The folder of all checkpoints.
        step: The optimizer step, recorded in the state.
        groups: Tensors by name, by group; each group becomes one file.
        state: Plain values and tensors only.
        name: The name of the checkpoint's folder; `step-N` by default.
    """
    path = folder / (name or step_name(step))
    with atomic_dir(path) as partial:
        checksums = {}
        for group, tensors in groups.items():
            file = partial / f"{group}.safetensors"
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file)
            checksums[file.name] = checksum(file)
        save_state(partial, {"step": step, **state, "checksums": checksums})
    return path


def load_checkpoint(path: Path) -> tuple[Groups, dict[str, Any]]:
    """Return (groups, state) of a checkpoint, on the CPU.

    Raises:
        RunError: A file is damaged or missing.
    """
    try:
        return _read(path)
    except _DAMAGE as error:
        raise RunError(f"{_describe(path, error)}; remove that folder to use the checkpoint before it") from error


def read_groups(path: Path) -> Groups:
    """Return all groups of a checkpoint, whole, on the CPU."""
    if is_sharded(path):
        return read_whole(path)
    return {file.stem: load_file(file) for file in path.glob("*.safetensors")}


def load_latest_checkpoint(folder: Path, read: Callable[[Path], Groups] = read_groups) -> Checkpoint | None:
    """Return the newest intact checkpoint under a folder, or None if there are no checkpoints.

    A damaged checkpoint is reported and skipped. It stays on the disk, so that all processes of a run reach the same result.

    Args:
        folder: The folder of all checkpoints.
        read: Reads the groups of tensors that this process needs.

    Raises:
        RunError: There are checkpoints, and all of them are damaged.
    """
    saved = checkpoints(folder)
    for path in reversed(saved):
        try:
            return Checkpoint(path, *_read(path, read))
        except _DAMAGE as error:
            logger.warning(f"{_describe(path, error)}; trying the checkpoint before it")
    if saved:
        raise RunError(f"all checkpoints in {folder} are damaged; remove that folder to train again from step 0")
    return None


def last_global_batch(folder: Path) -> int | None:
    """Return the samples per step that the newest checkpoint was trained with; None if there is none to be read."""
    for path in reversed(checkpoints(folder)):
        try:
            return _read_state(path)["global_batch"]
        except (*_DAMAGE, KeyError):
            continue
    return None


def _read(path: Path, read: Callable[[Path], Groups] = read_groups) -> tuple[Groups, dict[str, Any]]:
    """Return (groups, state). A checkpoint that an older version wrote has no checksums to verify."""
    state = _read_state(path)
    for name, expected in state.pop("checksums", {}).items():
        if checksum(path / name) != expected:
            raise EOFError(f"{name} does not match its checksum")
    return read(path), state


def _read_state(path: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint. torch stores checksums of them, and does not compare them itself."""
    raw = (path / "state.pt").read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise EOFError(f"{damaged} does not match its checksum")
        return dict(torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu"))
    except Exception as error:  # damaged bytes are instructions to the unpickler
        raise EOFError(f"state.pt cannot be read: {error}") from error


_DAMAGE = (SafetensorError, RuntimeError, EOFError, UnpicklingError, FileNotFoundError, IsADirectoryError)
"what reading a damaged checkpoint raises"


def _describe(path: Path, error: BaseException) -> str:
    return f"the checkpoint {path} is damaged ({(str(error) or type(error).__name__).splitlines()[0]})"


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint."""
    remove_folder(_hide(path))


def _hide(path: Path) -> Path:
    """Rename a checkpoint before its removal: an interrupted one must not leave a folder that looks complete."""
    return path.rename(hidden_sibling(path, REMOVED))


def prune(folder: Path, keep: int, last: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes and removals left behind.

    Args:
        folder: The folder of all checkpoints.
        keep: How many checkpoints to keep.
        last: The step that was just saved. A later checkpoint is one that was found damaged, and is removed.
    """
    saved = checkpoints(folder)
    stale = [path for path in saved if last is not None and checkpoint_step(path) > last]
    current = saved[: len(saved) - len(stale)]
    for path in (*stale, *current[:-keep]):
        _hide(path)
    for suffix in (PARTIAL, REPLACED, REMOVED):
        for path in folder.glob(f".step-*.{suffix}"):  # not of `best`, which another thread may be writing
            remove_folder(path)
