"""Write checkpoints in a background thread; flatten and restore optimizer state."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.utils.checkpoint import prune, save_checkpoint
from lcmdistill.utils.device import cpu_memory_left


class CheckpointWriter:
    """Write the checkpoints of a run in a thread, from a copy on the CPU, while training continues; one at a time.

    A copy that would take more than half of the available main memory is not made: the checkpoint is then written directly.

    Args:
        folder: The folder of the checkpoints.
        keep: How many checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Start writing the checkpoint of a step. An error of the previous one is raised here."""
        self.wait()
        size = sum(value.nbytes for tensors in groups.values() for value in tensors.values())
        if size > cpu_memory_left() / 2:
            self._write(step, groups, state)
            return
        # Strides stay as they are: the thread makes the copies contiguous.
        copies = {k: {n: _copy(v) for n, v in tensors.items()} for k, tensors in groups.items()}
        self._writing = self._thread.submit(self._write, step, copies, state)

    def wait(self) -> None:
        """Wait until everything is written. An error of the thread is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        save_checkpoint(self._folder, step, groups, state)
        prune(self._folder, self._keep, last=step)

    def close(self) -> None:
        """Wait, and remove extra checkpoints of a run that was killed before it removed them. For the main process."""
        self.wait()
        prune(self._folder, self._keep)


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as flat tensors, "parameter index.name"; an int becomes a tensor of int64."""
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
                # A file has no strides, and a fused step needs those of the parameter.
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
