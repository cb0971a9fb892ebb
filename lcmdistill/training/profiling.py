"""Where the time and the memory of a run go: seconds per phase, model FLOPs utilization, and traces.

    profiler = make_profiler(config, teacher, folder, device)
    with profiler:
        with profiler.phase("data"): ...        # in any thread; phases may be nested
        profiler.step()                         # after each optimizer step
        values |= profiler.metrics(samples)     # at a line of metrics

`lcmdistill.utils.metrics_log.METRICS` says what the values mean.
"""

import contextlib
import logging
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.flop_counter import FlopCounterMode

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.buckets import largest
from lcmdistill.objectives.base import step_cost
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import atomic_file
from lcmdistill.utils.device import GIB, compute_dtype, peak_memory, peak_process_memory

logger = logging.getLogger(__name__)

PHASES = ("data", "encoding", "teacher", "target", "forward", "backward", "optimizer", "other")
"phases of a training step; `other` is the time in which no thread was in any of the others"

PAUSES = ("validation", "checkpoint")
"phases in which a run does not train: they are reported, and do not count for the utilization"

TRACE_WARM_UP = 3
"steps before a trace begins: compilation, autotuning and the optimizer's state are done by then"

PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200|GH200": (989, 67),
    "H800": (989, 67),
    "A100|A800": (312, 19.5),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "A40": (150, 37.4),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX A6000": (155, 38.7),
    "RTX 6000 Ada": (364, 91.1),
    "RTX 5090": (210, 104.8),
    "RTX 4090": (165, 82.6),
    "RTX 4080": (97.5, 48.7),
    "RTX 3090": (71, 35.6),
    "RTX 3080": (59.5, 29.8),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}
"""Published dense TFLOP/s of GPUs, (half precision with fp32 accumulation, fp32), by a part of the device's name. The first
that matches counts."""

Mark = Any
"a point in time: seconds, or an event in the current stream of a GPU"


class PhaseTimer:
    """Accumulate the seconds of named phases, in any thread, until `collect` reads them.

    On a GPU the phases are timed by events, so no step waits for the device. Time in a nested phase does not count for the
    phase around it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._device = device.type == "cuda", device
        self._local = threading.local()
        self._intervals: deque[tuple[str, Mark, Mark]] = deque()
        self.annotate = False
        "whether phases are ranges in a trace"
        self._begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase."""
        stack: list[tuple[str, Mark]] = self._local.__dict__.setdefault("stack", [])
        start = self._mark()
        if stack:
            outer, since = stack[-1]
            self._intervals.append((outer, since, start))
        stack.append((name, start))
        try:
            with record_function(name) if self.annotate else contextlib.nullcontext():
                yield
        finally:
            _, since = stack.pop()
            end = self._mark()
            self._intervals.append((name, since, end))
            if stack:
                stack[-1] = stack[-1][0], end

    def collect(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and those of no phase as `other`.

        Phases of parallel threads each count, so the sum can exceed the time that has passed. A phase that is still under way
        counts once it ends.
        """
        seconds, spans = defaultdict[str, float](float), []
        for _ in range(len(self._intervals)):
            name, start, end = self._intervals.popleft()
            first, last = self._since_begin(start), self._since_begin(end)
            seconds[name] += last - first
            spans.append((max(first, 0.0), last))
        elapsed = time.perf_counter() - self._began
        covered, reached = 0.0, 0.0
        for first, last in sorted(spans):
            covered += max(0.0, last - max(first, reached))
            reached = max(reached, last)
        self._begin()
        return {**seconds, "other": max(0.0, elapsed - covered)}

    def _begin(self) -> None:
        self._base = self._mark()
        self._began = time.perf_counter()

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _since_begin(self, mark: Mark) -> float:
        if not self._on_gpu:
            return mark - self._base
        mark.synchronize()
        return self._base.elapsed_time(mark) / 1000


@dataclass(frozen=True)
class PeakRate:
    """The most FLOP/s of a device, and where the number is from."""

    flops: float
    source: str


@cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> PeakRate:
    """Return the published rate of a known GPU, otherwise the rate of a large matrix product, measured once per process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = str(dtype).removeprefix("torch.")
    for pattern, (half, full) in PEAK_TFLOPS.items():
        if device.type == "cuda" and re.search(rf"\b({pattern})\b", name):
            return PeakRate(1e12 * (full if dtype == torch.float32 else half), f"published for {name}, {precision}")
    return PeakRate(_matmul_rate(device, dtype), f"measured: a matrix product on {name}, {precision}")


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def forward_flops(teacher: Teacher, size: int | tuple[int, int]) -> int:
    """Return the FLOPs of one forward pass of the teacher's network for one sample, counted on the meta device.

    Args:
        teacher: The teacher; its student has the same network.
        size: Of the images in pixels, a square's side or (height, width).
    """
    z, t, c = teacher.example(1, size, "meta")
    with torch.device("meta"):
        network = type(teacher.network).from_config(teacher.network.config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher.call(network, z, t, c.values, None)
    return counter.get_total_flops()


class Trace:
    """A torch.profiler trace of a few steps, written into a folder: after `TRACE_WARM_UP` steps, or as far as the run gets."""

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self._folder, self._last = folder, steps + TRACE_WARM_UP
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=TRACE_WARM_UP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            experimental_config=_all_threads(),
        )
        self._written = False
        self._profile.start()

    def step(self) -> None:
        """Note the end of a step."""
        self._profile.step()

    def close(self) -> None:
        """Write the trace, if it is under way, and stop."""
        self._profile.stop()
        if not self._written:
            logger.warning(f"profile: the run ended within the {TRACE_WARM_UP} warm-up steps; no trace was written")

    def _write(self, profile: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{TRACE_WARM_UP + 1}-to-{min(profile.step_num, self._last)}.json.gz"
        with atomic_file(path) as partial:
            profile.export_chrome_trace(str(partial))
        self._written = True
        logger.info(f"profile: trace written to {path}; open it at https://ui.perfetto.dev")


def _all_threads() -> Any:
    """Return the option that traces all threads, not only the one that starts the profiler; older versions lack it."""
    from torch._C._profiler import _ExperimentalConfig

    try:
        return _ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        return _ExperimentalConfig()


class RunProfiler:
    """What the training loop reports to, and what it logs. See the module for how it is called."""

    def __init__(
        self, device: torch.device, *, flops_per_sample: float, peak: PeakRate, trace: Trace | None = None
    ) -> None:
        self._device, self._flops, self._peak, self._trace = device, flops_per_sample, peak, trace
        self.timer = PhaseTimer(device)
        self.timer.annotate = trace is not None
        self._last_line = time.perf_counter()
        peak_memory(device, reset=True)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a phase: one of PHASES or PAUSES."""
        return self.timer.phase(name)

    def step(self) -> None:
        """Note the end of an optimizer step."""
        if self._trace is not None:
            self._trace.step()

    def metrics(self, samples: float) -> dict[str, float]:
        """Return the values for a line of metrics, over the time since the last line.

        Args:
            samples: How many samples this process has trained on since then.
        """
        seconds = self.timer.collect()
        now = time.perf_counter()
        training = now - self._last_line - sum(seconds.get(name, 0.0) for name in PAUSES)
        self._last_line = now
        values = {f"seconds_{name}": round(seconds[name], 4) for name in (*PHASES, *PAUSES) if name in seconds}
        memory = peak_memory(self._device, reset=True) if self._device.type == "cuda" else peak_process_memory()
        if memory is not None:
            values["peak_memory_gib"] = round(memory / GIB, 3)
        return {**values, "mfu": round(samples * self._flops / max(training, 1e-9) / self._peak.flops, 4)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._trace is not None:
            self._trace.close()


def make_profiler(
    config: RunConfig,
    teacher: Teacher,
    folder: Path,
    device: torch.device,
    *,
    is_main: bool = True,
) -> RunProfiler:
    """Return the profiler of a run. It logs, for log.txt only, what the utilization is relative to.

    Args:
        config: The configuration of the run.
        teacher: The teacher.
        folder: The run folder; traces go to its `profile/`.
        device: The device of this process.
        is_main: Whether this is the main process, the only one that writes a trace.
    """
    is_cached, is_adapter = config.data.teacher_cache_samples > 0, config.student.kind == "lora"
    forward = forward_flops(teacher, largest(config.data, teacher.multiple))
    flops = forward * step_cost(config.objective, cached_teacher=is_cached, adapter=is_adapter)
    peak = peak_rate(device, compute_dtype(config.run.precision, device))
    trace = Trace(folder / "profile", config.run.profile, device) if config.run.profile and is_main else None
    logger.debug(
        f"profiling: a forward pass takes {forward / 1e9:.4g} GFLOP per sample, training {flops / 1e9:.4g}; "
        f"mfu is relative to {peak.flops / 1e12:.4g} TFLOP/s ({peak.source})"
    )
    return RunProfiler(device, flops_per_sample=flops, peak=peak, trace=trace)
