"""Helpers that several tests share."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcmdistill.utils.run_dir import checkpoints

ROOT = Path(__file__).parent.parent.parent

Runner = Callable[..., Path]

VALUES = ("step", "loss", "grad_norm", "learning_rate", "samples_per_s", "data_wait")
"the numbers of a line of metrics, besides those of the profiler"

CLOCK = ("samples_per_s", "data_wait", "seconds_", "peak_memory", "mfu", "checksum")
"prefixes of the fields that depend on the clock and the machine"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def result(folder: Path) -> dict[str, Any]:
    """All that a run computed: its last checkpoint, its metrics and its pipeline's network, to the bit."""
    last = checkpoints(folder / "checkpoints")[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    tensors = {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}
    unet = (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return {"state": state, **tensors, "metrics": metrics(folder), "unet": unet}


def assert_same(one: Path, other: Path) -> None:
    mine, its = result(one), result(other)
    assert mine.keys() == its.keys() >= {"student.safetensors", "target.safetensors", "optimizer.safetensors"}
    assert [key for key in mine if mine[key] != its[key]] == []


def kill_run(config: Path, folder: Path, line_start: str) -> None:
    """Start the run of a config.toml in a process, into a folder, and kill it with signal 9 when it logs such a line."""
    command = [sys.executable, "-m", "lcmdistill", "distill", "--config", str(config), "--output", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(line_start):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
