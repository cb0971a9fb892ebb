"""Process-wide switches: everything that this program sets outside of its own objects, with the reason.

| switch | when | why |
|---|---|---|
| `DIFFUSERS_VERBOSITY`, `TRANSFORMERS_VERBOSITY`, warning filters | process | libraries' notices are not for the user |
| `GOMP_SPINCOUNT` | process | see `SPIN_COUNT` |
| garbage collector's thresholds | process | see `GC_THRESHOLDS` |
| garbage collection at the interpreter's exit | process | see `exit_without_collecting` |
| encoding errors of standard output | process | a terminal without Unicode shows escapes instead of a traceback |
| cuDNN's benchmark mode, `channels_last` | training on CUDA | few shapes and many steps; cuDNN's own layout |
| malloc's thresholds | training on a CPU | see `_keep_freed_memory` |

A value that the environment already has is never replaced. `configure_training` logs at DEBUG, into `log.txt`, what was set.
This module imports torch only for training.
"""

import ctypes
import gc
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SPIN_COUNT = "3000"
"""How often a thread of GNU OpenMP polls for work before it sleeps: some 30 microseconds, in which the next of a network's
operations has arrived. With the default of 3 ms, threads of another program keep waiting for the very core that this
thread occupies; to sleep at once costs more than most operations take."""

GC_THRESHOLDS = (100_000, 50, 50)
"importing the libraries makes a million objects and no garbage; looking for some takes a tenth of a command's start"

clock = time.perf_counter
"the clock of estimates"

_settings: dict[str, object] = {}
"what was set in this process, for the log"


def configure_process() -> None:
    """Set what must be set before torch is imported. For programs only, not for use as a library."""
    # diffusers logs an error before it raises it.
    for name, level in (("DIFFUSERS_VERBOSITY", "critical"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, level)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # from huggingface_hub, about diffusers' call
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces a temporary folder for its cache
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao, which lists kernels that are not there
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ |= thread_environment(os.environ)
    collect_garbage_rarely()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    names = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    _settings.update({name: os.environ[name] for name in names if name in os.environ})


def thread_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which OpenMP threads poll `SPIN_COUNT` times, unless it already specifies how they wait."""
    return dict(environment) if "OMP_WAIT_POLICY" in environment else {"GOMP_SPINCOUNT": SPIN_COUNT, **environment}


def collect_garbage_rarely() -> None:
    """Raise the garbage collector's thresholds to `GC_THRESHOLDS`."""
    gc.set_threshold(*GC_THRESHOLDS)
    _settings["gc thresholds"] = GC_THRESHOLDS


def exit_without_collecting() -> None:
    """Keep the interpreter's exit from looking for garbage in all that the libraries made, which takes it a second."""
    gc.freeze()


def configure_training(device: "torch.device", networks: "torch.nn.Module") -> None:
    """Set what makes training on a device fast, and log all switches of this process.

    Args:
        device: The device of the run.
        networks: The networks, whose memory layout is changed in place; files do not depend on it.
    """
    import torch

    if device.type == "cuda":
        networks.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        torch.backends.cudnn.benchmark = True
        _settings.update({"memory format": "channels_last", "cudnn.benchmark": True})
    elif device.type == "cpu":  # where oneDNN's convolutions have a layout of their own
        _settings["malloc keeps freed memory"] = _keep_freed_memory()
    _settings["threads"] = torch.get_num_threads()
    logger.debug("runtime: " + ", ".join(f"{name} = {value}" for name, value in _settings.items()))


def _keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next one; return whether it does.

    By default large tensors return to the system each time, and come back as pages that the system has to zero.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    if not mallopt(m_mmap_threshold, 2**30):
        mallopt(m_mmap_threshold, 2**25)  # the most that older versions accept
    return bool(mallopt(m_trim_threshold, 2**31 - 1))
