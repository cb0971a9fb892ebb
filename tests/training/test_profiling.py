"""Profiling: seconds per phase, FLOPs, utilization and traces."""

import gzip
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.base import step_cost
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training import profiling
from lcmdistill.training.profiling import (
    PeakRate,
    PhaseTimer,
    RunProfiler,
    forward_flops,
    make_profiler,
    peak_rate,
)
from lcmdistill.utils.metrics_log import METRICS
from tests.support.memory import configured

CPU = torch.device("cpu")


class Clock:
    """A clock that only `tick` moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds


def test_time_in_a_nested_phase_counts_for_that_phase_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = PhaseTimer(CPU)
    for _ in range(2):
        clock.tick(1)
        with timer.phase("forward"):
            clock.tick(2)
            with timer.phase("target"):
                clock.tick(4)
            clock.tick(8)
        with timer.phase("backward"):
            clock.tick(16)
    assert timer.collect() == {"forward": 20, "target": 8, "backward": 32, "other": 2}
    clock.tick(3)
    assert timer.collect() == {"other": 3}


def test_a_phase_that_fails_is_still_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = PhaseTimer(CPU)

    def fail() -> None:
        with timer.phase("forward"), timer.phase("target"):
            clock.tick(1)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    with timer.phase("data"):
        clock.tick(2)
    assert timer.collect() == {"forward": 0, "target": 1, "data": 2, "other": 0}


def test_a_phase_in_another_thread_counts_and_is_not_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = PhaseTimer(CPU)
    started, stop = threading.Event(), threading.Event()

    def teacher() -> None:
        with timer.phase("teacher"):
            started.set()
            stop.wait(10)

    thread = threading.Thread(target=teacher)
    thread.start()
    started.wait(10)
    clock.tick(1)
    with timer.phase("backward"):
        clock.tick(4)
    stop.set()
    thread.join()
    clock.tick(2)
    assert timer.collect() == {"teacher": 5, "backward": 4, "other": 2}


def test_a_phase_over_a_line_of_metrics_counts_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = PhaseTimer(CPU)
    with timer.phase("teacher"):
        clock.tick(3)
        assert timer.collect() == {"other": 3}
        clock.tick(4)
    clock.tick(1)
    assert timer.collect() == {"teacher": 7, "other": 1}


def test_a_phase_costs_next_to_nothing() -> None:
    timer = PhaseTimer(CPU)
    began = time.thread_time()
    for _ in range(1000):
        with timer.phase("data"):
            pass
    assert time.thread_time() - began < 0.1
    timer.collect()


def test_flops_are_those_of_a_real_forward_pass(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    z, t, c = teacher.example(1, 64, "cpu")
    # The CPU's fused attention is not among the operations that the counter knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher.call(teacher.network, z, t, c.values, None)
    assert forward_flops(teacher, 64) == counter.get_total_flops() > 1e6
    assert forward_flops(teacher, (64, 128)) > 1.9 * forward_flops(teacher, 64)


def test_a_sample_takes_its_forwards_and_the_backward_pass() -> None:
    lcm, matching = OBJECTIVES["lcm"](), OBJECTIVES["tdm"](segments=4)
    assert step_cost(lcm) == 6
    assert step_cost(lcm, adapter=True) == 5
    assert step_cost(lcm, cached_teacher=True) == 4
    assert step_cost(matching) == 13  # 4 of the rollout, 3 of the critic, 6 of the student


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("Tesla T4", 65, 8.1),
    ],
)
def test_known_gpus_have_a_published_rate(name: str, bf16: float, fp32: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    rate = peak_rate.__wrapped__
    assert rate(torch.device("cuda"), torch.bfloat16) == PeakRate(bf16 * 1e12, f"published for {name}, bfloat16")
    assert rate(torch.device("cuda"), torch.float32).flops == fp32 * 1e12


def test_other_devices_are_measured_once_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(profiling, "_matmul_rate", lambda *arguments: calls.append(arguments) or 5.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU H1000")
    peak_rate.cache_clear()
    for device in (CPU, CPU, torch.device("cuda")):
        rate = peak_rate(device, torch.float32)
    assert rate == PeakRate(5.0, "measured: a matrix product on Some GPU H1000, float32")
    assert len(calls) == 2
    peak_rate.cache_clear()


def test_a_line_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    profiler = RunProfiler(CPU, flops_per_sample=6.0, peak=PeakRate(100.0, "a test"))
    with profiler.phase("forward"):
        clock.tick(2)
    with profiler.phase("validation"):
        clock.tick(100)
    clock.tick(1)
    values = profiler.metrics(samples=10)
    assert values.pop("peak_memory_gib") > 0.1
    assert values == {"seconds_forward": 2, "seconds_validation": 100, "seconds_other": 1, "mfu": 0.2}
    assert {"seconds_PHASE", "peak_memory_gib", "mfu"} <= METRICS.keys()


@pytest.mark.parametrize("steps", [1, 4, 5, 9])
def test_a_trace_has_the_requested_steps_with_their_phases(
    steps: int, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(small_teacher, run__profile=2)
    teacher = load_teacher(str(small_teacher))
    assert make_profiler(config, teacher, tmp_path, CPU, is_main=False).timer.annotate is False
    with make_profiler(config, teacher, tmp_path, CPU) as profiler:
        for _ in range(steps):
            with profiler.phase("forward"):
                torch.mm(torch.ones(8, 8), torch.ones(8, 8))
            profiler.step()
    output = capsys.readouterr().out
    if steps < 4:
        assert output == "profile: the run ended within the 3 warm-up steps; no trace was written\n"
        assert list(tmp_path.iterdir()) == []
        return
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"steps-4-to-{min(steps, 5)}.json.gz"
    assert output == f"profile: trace written to {path}; open it at https://ui.perfetto.dev\n"
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op")]
    assert names.count("forward") == names.count("aten::mm") == min(steps, 5) - 3


def test_cached_teacher_outputs_take_no_flops(small_teacher: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    config = configured(small_teacher)
    cached = replace(config, data=replace(config.data, teacher_cache_samples=1))
    plain, fewer = (make_profiler(c, teacher, tmp_path, CPU)._flops for c in (config, cached))
    assert fewer == pytest.approx(plain * 4 / 6)
