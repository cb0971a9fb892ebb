"""Seconds, FLOPs and bytes of the benchmark."""

import resource
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lcmdistill.config.schema import RunConfig
from lcmdistill.objectives.base import step_cost
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.device import peak_memory


class Clock:
    """Seconds of each part, by name. On a GPU, events in its stream measure them, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._one_at_a_time = threading.Lock()
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str, share: float = 1.0) -> Iterator[None]:
        """Time a part. share: its share of the machine while other threads run."""
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((part, first, last))
            return
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        with self._one_at_a_time:
            self.seconds[part] += seconds * share

    def wait(self) -> None:
        """Wait until the device is idle and all parts are counted."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for part, first, last in self._events:
            self.seconds[part] += first.elapsed_time(last) / 1000
        self._events.clear()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 256  # a CPU may have no bf16 of its own
    a, clock = torch.rand(n, n, device=device, dtype=dtype), Clock(device)
    torch.mm(a, a)
    clock.wait()
    with clock("product"):
        for _ in range(4):
            torch.mm(a, a)
    clock.wait()
    return 4 * 2 * n**3 / clock.seconds["product"]


def most_held(device: torch.device) -> int:
    """Return the peak bytes: of a GPU's tensors, or of the whole process on a CPU."""
    return peak_memory(device) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_flops(config: RunConfig, teacher: Teacher) -> float:
    """Return the FLOPs of a step, which costs six forward passes: student 3, teacher 2, target 1.

    They are counted on the teacher's network; a student's omega input adds next to nothing.
    """
    z, t, c = teacher.example(config.optim.batch_size, config.data.resolution, "meta")
    with torch.device("meta"):
        network = type(teacher.network).from_config(teacher.network.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.call(network, z, t, c.values, None)
    return counter.get_total_flops() * step_cost(config.objective)
