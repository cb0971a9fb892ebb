"""Files that are either whole or not there: folders written aside and renamed; checkpoints; resuming.

A checkpoint is `checkpoints/step-00000100/`: one safetensors file for each group of tensors, and a small `state.pt`
that is read with weights_only.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmdistill.device import cpu_memory_left
from lcmdistill.errors import RunError

# There is no other way to ask for it.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
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
def file_written_aside(destination: Path, *, shared: bool = False) -> Iterator[Path]:
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
    """A small text file, whole or not there. shared: as `file_written_aside`."""
    with file_written_aside(path, shared=shared) as aside:
        aside.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Onto the disk, and readable for whoever files are here: safetensors leaves its own to their owner alone."""
    path.chmod(0o666 & ~_UMASK)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    name: str | None = None,
) -> Path:
    """Write `step-N` under `folder`, or another name. groups: name -> tensors; state: plain values and tensors only."""
    path = folder / (name or step_name(step))
    with written_aside(path) as aside:
        for name, tensors in groups.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside / f"{name}.safetensors")
        torch.save({"step": step, **state}, aside / "state.pt")
    return path


class Writer:
    """Writes a run's checkpoints in a thread, from a copy on the CPU, while training goes on: one at a time.

    Where the copy would take more than half of the memory that the CPU has left, it is written at once and without one.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Begin to write the checkpoint of a step; what the last one met with is raised here."""
        self.wait()
        size = sum(value.nbytes for tensors in groups.values() for value in tensors.values())
        if size > cpu_memory_left() / 2:
            self._write(step, groups, state)
            return
        # Strides stay as they are: the thread makes contiguous what is not.
        copied = {k: {n: _copy(v) for n, v in tensors.items()} for k, tensors in groups.items()}
        self._writing = self._thread.submit(self._write, step, copied, state)

    def wait(self) -> None:
        """Come back once everything is written; raises what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        save_checkpoint(self._folder, step, groups, state)
        prune(self._folder, self._keep)


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(groups, state) of a checkpoint, on the CPU. Raises RunError on one that is damaged."""
    try:
        groups = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return groups, torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise RunError(
            f"the checkpoint {path} is damaged ({(str(error) or type(error).__name__).splitlines()[0]}); remove that folder, "
            "and the one before it is used"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.pt").is_file())


def step_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        # Renamed first: a removal that is cut off must not leave something that looks whole.
        doomed = path.rename(path.with_name(f".{path.name}.old"))
        shutil.rmtree(doomed)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors, "parameter index.name"; a plain whole number becomes one of int64."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`; the parameter groups stay as they are."""
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        is_number = value.dtype == torch.int64 and value.ndim == 0
        state.setdefault(int(index), {})[name] = int(value) if is_number else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                # The file knows no strides, and a fused step wants them to be the parameter's.
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
