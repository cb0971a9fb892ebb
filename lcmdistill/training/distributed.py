"""The processes that a run is spread over, on their device: the only file that knows accelerate."""

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
from lcmdistill.utils.errors import UsageError

__all__ = ["Accelerator", "StopSignal", "gather", "make_accelerator", "min_free_memory"]


def make_accelerator(config: RunConfig) -> Accelerator:
    """The processes that were launched, on the device and with the loss scaler that the configuration asks for.

    Raises UsageError on a way of sharding that is not supported.
    """
    device = pick_device(config.run.device)
    if config.run.device != "auto" and "LOCAL_RANK" not in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    dtype = compute_dtype(config.run.precision, device)
    # bf16 needs no loss scaling; autocast itself is the student's own business.
    mixed = "fp16" if dtype == torch.float16 and device.type == "cuda" else "no"
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    once: Any = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True
    )  # gradients that lie in memory once, not twice
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[patient, once])
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(f"{accelerator.distributed_type.value} is not supported yet; use torchrun, or multi-GPU (DDP)")
    return accelerator


def gather(value: Tensor, accelerator: Accelerator) -> Tensor:
    """A tensor of every process, (processes, ...)."""
    gathered: Any = accelerator.gather(value[None])
    return gathered


def min_free_memory(accelerator: Accelerator) -> float:
    """The bytes that every process's device has free: the same answer on all of them."""
    free = torch.tensor(free_memory(accelerator.device), dtype=torch.float32, device=accelerator.device)
    return float(gather(free, accelerator).min())


class StopSignal:
    """The same answer on every process: a signal that any of them has met.

    Of several processes it is heard a step late, so that no device has to finish its step before the next is under way.
    """

    def __init__(self, stop: Stop, accelerator: Accelerator) -> None:
        self._stop, self._accelerator = stop, accelerator
        self._asked: Tensor | None = None

    def signal(self) -> int:
        """To be asked once a step, by all processes."""
        if self._accelerator.num_processes == 1:
            return self._stop.signal
        mine = torch.full((), float(self._stop.signal), device=self._accelerator.device)
        before, self._asked = self._asked, gather(mine, self._accelerator)
        return 0 if before is None else round(float(before.max()))
