"""Time the step of each method on one GPU, next to the plain loop's, within a number of minutes.

    python examples/bench/gpu.py             # on a GPU, 14 minutes: SD 1.5 at 512 px and SDXL at 1024 px, random weights, bf16
    python examples/bench/gpu.py --tiny      # the same rows with the bundled teacher on the CPU, 2 steps each: writes nothing

Each row runs in a process of its own, in the order of ROWS; those that the time does not suffice for are "not measured".
Writes results/gpu.json after each row, and the tables of README.md at the end.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from run import HERE, naive, product, settings, teacher_of
from tables import RESULTS, table, write_tables

from lcmdistill.config.schema import RunConfig
from lcmdistill.training.profiling import make_profiler
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.device import pick_device


class Row(NamedTuple):
    """A measurement. method: of lcmdistill, or "plain loop", which is an LCM."""

    model: str
    kind: str
    method: str
    compiled: bool = False


ROWS = (
    *(Row("sd15", kind, method) for kind in ("full", "lora") for method in ("plain loop", "lcm")),
    *(Row("sdxl", "lora", method) for method in ("plain loop", "lcm")),
    *(Row("sd15", kind, "lcm", compiled=True) for kind in ("full", "lora")),
    *(Row(model, kind, method) for method in ("pcm", "tdm") for model, kind in (("sd15", "full"), ("sdxl", "lora"))),
    *(Row("sdxl", "full", method) for method in ("plain loop", "lcm")),
    *(Row("sd15", "lora", method) for method in ("pcm", "tdm")),
    *(Row("sdxl", "full", method) for method in ("pcm", "tdm")),
)
BATCH = {"sd15": 16, "sdxl": 4}
WARM, STEPS = 4, 16
PHASES = {
    "VAE and text encoder": "encoding",
    "teacher": "teacher",
    "target": "target",
    "student, forward and backward": "forward",
    "clip, AdamW, EMA": "optimizer",
}
"part of the plain loop -> phase of a run"


def configured(row: Row, *, tiny: bool) -> tuple[str, RunConfig, dict[str, Any]]:
    """Return the name of a row's teacher, its configuration, and the settings that led to it."""
    name = "tiny" if tiny else row.model
    method = "lcm" if row.method == "plain loop" else row.method
    changes: dict[str, Any] = {"student.kind": row.kind, "objective.name": method}
    changes |= {"run.compile": "on" if row.compiled and not tiny else "off"}
    changes |= {"optim.batch_size": 2, "data.max_samples": 16} if tiny else {"optim.batch_size": BATCH[row.model]}
    changes |= {"run.device": str(pick_device("cpu" if tiny else "auto"))}
    return name, settings(name, **changes), changes


def measured(row: Row, *, tiny: bool) -> dict[str, Any]:
    """Take a row's steps, and return its numbers."""
    name, config, changes = configured(row, tiny=tiny)
    device = torch.device(config.run.device)
    if row.method == "plain loop":
        # It counts the FLOPs of a run's step, whatever else the plain loop computes.
        profiler = make_profiler(config, teacher_of(name, torch.device("meta")), HERE, device)

        def clock(part: str) -> AbstractContextManager[None]:
            return profiler.phase(PHASES[part])

        steps: Iterator[Any] = naive(name, device, config, clock)
    else:
        trainer, _ = product(name, device, **changes)
        profiler, steps = trainer.profiler, trainer.steps()
    warm, count = (1, 2) if tiny else (WARM, STEPS)
    for _ in range(warm):
        next(steps)
    samples = count * config.optim.batch_size * config.optim.gradient_accumulation_steps
    profiler.metrics(samples)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    numbers = profiler.metrics(samples)  # waits for the device
    return {"samples_per_s": samples / (time.perf_counter() - began), "steps": count, **numbers}


def run_rows(seconds: float, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the results so far, after each row."""
    ends = time.monotonic() + seconds
    results: list[dict[str, Any]] = [{**row._asdict(), "error": "not measured"} for row in ROWS]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for number, row in enumerate(ROWS):
        command = [sys.executable, __file__, "row", str(number), *(["--tiny"] if tiny else [])]
        try:
            left = max(0.0, ends - time.monotonic())
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            break
        lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines() or ["failed"]
        outcome = json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1][:200]}
        results[number] = {**row._asdict(), **outcome}
        yield {"name": "gpu", "device": device, "torch": torch.__version__, "methods": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=14, help="time for all rows")
    parser.add_argument("--tiny", action="store_true", help="test this script on the CPU")
    arguments = parser.parse_args()
    if arguments.command:
        print(json.dumps(measured(ROWS[int(arguments.command[1])], tiny=arguments.tiny)))
        return
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU, and torch sees none here; --tiny tests the script on the CPU")
    result = None
    for result in run_rows(60 * arguments.minutes, tiny=arguments.tiny):
        print(next(line for line in table(result).splitlines()[::-1] if "not measured" not in line), flush=True)
        if not arguments.tiny:
            write_text(RESULTS / "gpu.json", json.dumps(result, indent=1) + "\n")
    if result is not None and not arguments.tiny:
        write_tables()
        print(f"tables written to {HERE / 'README.md'}")


if __name__ == "__main__":
    main()
