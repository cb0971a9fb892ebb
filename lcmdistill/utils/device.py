"""Which device, and which dtype inside the networks."""

import ctypes
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from lcmdistill.utils.errors import UsageError


def copy_to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on another device, without waiting for what that device is still at."""
    if torch.device(device).type != "cuda":
        return value.to(device)
    return value.contiguous().pin_memory().to(device, non_blocking=True)


def pick_device(name: str) -> torch.device:
    """A device by name, or the best there is for "auto". Raises UsageError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is no device; use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"--device {name} was asked for, but torch sees no CUDA GPU here; use --device cpu or auto"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {name} was asked for, but there are {torch.cuda.device_count()} GPUs")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps was asked for, but it is not available here; use --device cpu or auto")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"--device {name!r} cannot be trained on; use auto, cpu, cuda, cuda:1 or mps")
    return device


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast and of frozen weights; "auto" is half precision on CUDA only."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in named:
        return named[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def free_memory(device: torch.device) -> float:
    """The bytes that a GPU has free; of other devices nothing is known, and it is infinite."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, where it is glibc's: for training on a CPU.

    Large tensors else go back to the system each time, and come again as pages that it has to zero.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        if not mallopt(m_mmap_threshold, 2**30):
            mallopt(m_mmap_threshold, 2**25)  # all that an older one allows
        mallopt(m_trim_threshold, 2**31 - 1)


def cpu_memory_left() -> float:
    """The bytes that the CPU's memory can still give; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return math.inf


def peak_memory(device: torch.device, *, anew: bool = False) -> int | None:
    """The most bytes of tensors that a GPU has held at once since it was last asked to begin anew; None elsewhere."""
    if device.type != "cuda":
        return None
    if anew:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def cap_memory(device: torch.device, limit: float) -> None:
    """Let tensors of this process take `limit` bytes of a GPU and no more."""
    if device.type == "cuda":
        whole = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
