"""The device of a run, the dtype inside its networks, and the memory that there is."""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from lcmdistill.utils.errors import UsageError

GIB = 2**30
"the unit of memory everywhere: the memory of a '12 GB' graphics card is 12 GiB"


def copy_to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; from the CPU, without waiting for the device's current work."""
    if torch.device(device).type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.contiguous().pin_memory().to(device, non_blocking=True)


def pick_device(name: str) -> torch.device:
    """Return a device by name; "auto" is the best one available.

    Raises:
        UsageError: The device is unknown or not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown --device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name} is not available: torch finds no CUDA GPU; use --device cpu or auto")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UsageError(
                f"--device {name} is not available: the number of GPUs is {torch.cuda.device_count()}; use a lower index"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps is not available on this machine; use --device cpu or auto")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"--device {name!r} is not supported; use auto, cpu, cuda, cuda:1 or mps")
    return device


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast and of frozen weights; "auto" is half precision on CUDA only."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in named:
        return named[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU; infinity for other devices."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def cpu_memory_left() -> float:
    """Return the bytes of main memory that are still available; infinity where the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return math.inf


def peak_memory(device: torch.device, *, reset: bool = False) -> int | None:
    """Return the most bytes of tensors that a GPU has held at once since the last reset; None for other devices."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def peak_process_memory() -> int | None:
    """Return the most bytes of main memory that this process has used so far; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def cap_memory(device: torch.device, limit: float) -> None:
    """Limit the tensors of this process to `limit` bytes of a GPU."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
