"""What 8, 64 and 512 GPUs give: computed from bytes, FLOPs and published speeds.

    python examples/scaling.py              # the tables of examples/guides/scaling.md
    python examples/scaling.py --measure    # on Linux: the bytes of two processes on this machine, beside the computed ones

A step's time on a GPU is its FLOPs at an assumed share of the published rate. What it communicates is counted from the
parameters: with copies (DDP), the gradients in fp32 once per step; with shards (FSDP2), the weights in bf16 for each
evaluation and once more for the backward pass, and the gradients in fp32, for each micro-batch. A ring moves (N - 1) / N
of these bytes through each GPU's link, twice for a sum that all receive. Communication may overlap with computation
completely, or not at all: the efficiency lies between the two. Latency is left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from memory import configured, full_size

from lcmdistill.config.resolve import resolve
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.base import step_cost
from lcmdistill.students.lora import ONLINE, add_lora
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.lora.adapters import adapter_parameters
from lcmdistill.training.profiling import forward_flops

GPUS = (8, 64, 512)
ROWS = ("sd15-lora", "sd15-full", "sdxl-lora", "sdxl-full", "sd35l-lora", "sd35l-full")
SAMPLES = 12
"samples per GPU and step, in one micro-batch, when each GPU keeps its work"
GLOBAL_BATCH = 1024
"samples per step, when the work of a step is divided"
PEAK, SHARE = 989e12, 0.37
"published FLOP/s of an H100 or H200 in bf16; the share that SD 1.5 reached on one H200 (examples/bench)"
LINKS = {"NVLink, 450 GB/s": 450e9, "InfiniBand, 50 GB/s per GPU": 50e9, "Ethernet, 100 Gb/s per 8 GPUs": 1.5625e9}
"published bytes per second of a GPU's link in one direction; more than 8 GPUs use the network between machines"


@dataclass(frozen=True)
class Work:
    """One row: parameters of the network, parameters that are trained, and FLOPs of a training sample."""

    base: int
    trained: int
    flops: float

    def sent(self, gpus: int, *, shards: bool, width: int = 2) -> float:
        """Bytes through a GPU's link in a step of one micro-batch. width: bytes of a weight that is gathered."""
        ring = (gpus - 1) / gpus
        if not shards:
            return 2 * ring * 4 * self.trained
        evaluations = 4  # teacher, target, student, and the student's backward pass
        adapters = 2 * self.trained if self.trained < self.base / 2 else 0  # student's and EMA's, in the base's network
        return ring * (evaluations * width * (self.base + adapters) + 4 * self.trained)

    def seconds(self, samples: float) -> float:
        """Seconds of computation."""
        return samples * self.flops / (PEAK * SHARE)

    def efficiency(self, gpus: int, samples: float, link: float, *, shards: bool) -> tuple[float, float]:
        """The share of a step that is computation: without any overlap, and with a complete one."""
        computing, sending = self.seconds(samples), self.sent(gpus, shards=shards) / link
        return computing / (computing + sending), computing / max(computing, sending)


def work_of(row: str) -> Work:
    teacher = full_size(row.partition("-")[0])
    config = configured(row, teacher)
    base = sum(p.numel() for p in teacher.network.parameters())
    forward = forward_flops(teacher, config.data.resolution)
    is_lora = config.student.kind == "lora"
    if is_lora:
        add_lora(teacher.network, ONLINE, config.student, 0)
    trained = sum(p.numel() for p in adapter_parameters(teacher.network, ONLINE).values()) if is_lora else base
    return Work(base, trained, forward * step_cost(config.objective, adapter=is_lora))


def text(efficiency: tuple[float, float]) -> str:
    low, high = (f"{100 * value:.0f}" for value in efficiency)
    return f"{low} %" if low == high else f"{low} to {high} %"


def received() -> int:
    """Bytes that went through this machine's loopback device so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def measured(kind: str, shard: str, folder: Path, *options: str) -> float:
    """Bytes that both of two processes send in one step of the bundled teacher: those of 8 steps less those of 2."""
    totals = []
    for steps in (2, 8):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [
            *launcher,
            "-m",
            "lcmdistill",
            kind,
            "--teacher",
            "tiny",
            "--shard",
            shard,
            "--device",
            "cpu",
            *options,
        ]
        command += ["--max-train-steps", str(steps), "--output", str(folder / f"{kind}-{shard}-{steps}")]
        before = received()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        totals.append(received() - before)
    return (totals[1] - totals[0]) / 6


def measure() -> None:
    """Print a table of two processes with the bundled teacher in fp32. Other traffic on the loopback device is counted, too."""
    sizes = "optim.batch_size=2", "optim.gradient_accumulation_steps=1", "data.max_samples=64", "run.validate_every=0"
    options = [word for each in (*sizes, "run.checkpoint_every=100") for word in ("--set", each)]
    print("| run | processes hold | computed, MB per step | measured | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("distill", "distill-lora"):
            work = tiny_work(kind)
            for shard in ("off", "full"):
                computed = 2 * work.sent(2, shards=shard == "full", width=4)
                took = measured(kind, shard, Path(folder), *options)
                holds = "shards" if shard == "full" else "copies"
                print(
                    f"| {kind} | {holds} | {computed / 1e6:.1f} | {took / 1e6:.1f} | {took / computed - 1:+.0%} |",
                    flush=True,
                )


def tiny_work(kind: str) -> Work:
    """The work of the bundled teacher."""
    teacher = load_teacher("tiny")
    base = sum(p.numel() for p in teacher.network.parameters())
    if kind == "distill":
        return Work(base, base, 0.0)
    config = resolve({}, {"student.kind": "lora", "teacher.model": "tiny"}, objectives=OBJECTIVES)
    add_lora(teacher.network, ONLINE, config.student, 0)
    return Work(base, sum(p.numel() for p in adapter_parameters(teacher.network, ONLINE).values()), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="count the bytes of two processes on this machine")
    if parser.parse_args().measure:
        measure()
        return
    works = {row: work_of(row) for row in ROWS}
    print("| run | TFLOP per sample | samples/s per GPU | DDP, GB per step | shards, GB per step |")
    print("|---|---|---|---|---|")
    for row, work in works.items():
        sent = [work.sent(8, shards=shards) / 1e9 for shards in (False, True)]
        print(f"| {row} | {work.flops / 1e12:.1f} | {1 / work.seconds(1):.1f} | {sent[0]:.2f} | {sent[1]:.2f} |")
    for title, samples in (
        (f"Each GPU keeps {SAMPLES} samples per step", lambda gpus: SAMPLES),
        (f"{GLOBAL_BATCH} samples per step are divided", lambda gpus: GLOBAL_BATCH / gpus),
    ):
        print(f"\n{title}:\n")
        print("| run | processes hold | link | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |")
        print("|---|---|---|" + "---|" * len(GPUS))
        for row, work in works.items():
            for shards in (False, True):
                for link, speed in LINKS.items():
                    fits = [gpus for gpus in GPUS if gpus <= 8 or speed != max(LINKS.values())]
                    cells = [
                        text(work.efficiency(gpus, samples(gpus), speed, shards=shards)) if gpus in fits else "-"
                        for gpus in GPUS
                    ]
                    print(f"| {row} | {'shards' if shards else 'copies'} | {link} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
