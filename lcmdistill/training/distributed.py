"""The processes of a run and their devices. The only file that imports accelerate."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from lcmdistill.config.schema import RunConfig
from lcmdistill.training.signals import Stop
from lcmdistill.utils.device import compute_dtype, free_memory, pick_device
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.launch import check_launched

__all__ = ["Accelerator", "StopSignal", "check_same_step", "gather", "make_accelerator", "min_free_memory"]


def make_accelerator(config: RunConfig) -> Accelerator:
    """Return the launched processes, with the device and the loss scaler that the configuration requests.

    Raises:
        UsageError: The launcher requests a way of sharding that is not supported.
    """
    device = pick_device(config.run.device)
    check_launched()
    if config.run.device != "auto" and "LOCAL_RANK" not in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    dtype = compute_dtype(config.run.precision, device)
    # bf16 needs no loss scaling. Autocast is the students' own, not accelerate's.
    mixed = "fp16" if dtype == torch.float16 and device.type == "cuda" else "no"
    group = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the main process may prepare data for hours
    ddp: Any = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients are in memory once, not twice
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[group, ddp])
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(
            f"accelerate's configuration requests {accelerator.distributed_type.value}, which wraps the networks itself; "
            "launch plain processes (accelerate launch --multi_gpu, or torchrun), and pass --shard full for FSDP2"
        )
    return accelerator


def gather(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the tensors of all processes, (processes, ...)."""
    gathered: Any = accelerator.gather(value[None])
    return gathered


def check_same_step(step: int, accelerator: Accelerator) -> None:
    """Raise RunError, on all processes, unless they begin at the same step."""
    steps = gather(torch.tensor(step, device=accelerator.device), accelerator).tolist()
    if len(set(steps)) > 1:
        raise RunError(
            f"the processes found different checkpoints (steps {', '.join(map(str, steps))}), and all must resume from the "
            "same one; use an output folder that all machines share and can read"
        )


def min_free_memory(accelerator: Accelerator) -> float:
    """Return the least free bytes of any process's device: the same value on all processes."""
    free = torch.tensor(free_memory(accelerator.device), dtype=torch.float32, device=accelerator.device)
    return float(gather(free, accelerator).min())


class StopSignal:
    """A stop signal that any process received, as the same value on all of them.

    With several processes it arrives one step late, so that no device has to finish its step before the next one starts.
    """

    def __init__(self, stop: Stop, accelerator: Accelerator) -> None:
        self._stop, self._accelerator = stop, accelerator
        self._pending: Tensor | None = None

    def signal(self) -> int:
        """Return the signal, or 0. All processes call this once per step."""
        if self._accelerator.num_processes == 1:
            return self._stop.signal
        mine = torch.full((), float(self._stop.signal), device=self._accelerator.device)
        before, self._pending = self._pending, gather(mine, self._accelerator)
        return 0 if before is None else round(float(before.max()))
