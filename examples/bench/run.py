"""What a training step costs, beside the public scripts' way of doing it, in one run: speed, memory, and where the time goes.

    make bench                            # BENCH=tiny: the bundled teacher on the CPU
    make bench BENCH=sd15                 # on a GPU: Stable Diffusion 1.5's shapes, random weights, 512 px; or sdxl
    python examples/bench/run.py memory   # peak memory of LoRA and full runs, each in a process of its own

Naive loop (naive.py) and product, each in a process of its own, take steps in turn, on the same samples with the same draws,
so that what else the machine does meets both alike; the loss curves are compared. Ratios are of the sums over all rounds.
Writes results/NAME.json beside this file, README.md's tables, and a picture.
"""

import argparse
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from naive import Draws, naive_steps, untimed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lcmdistill.config.resolve import parse_assignment, resolve
from lcmdistill.config.schema import RunConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import prepare
from lcmdistill.data.sampler import SampleOrder
from lcmdistill.data.sources.registry import make_source
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.diffusion.random import Rng
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.common import sample_omega
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.distributed import make_accelerator
from lcmdistill.training.prefetch import Prefetcher
from lcmdistill.training.trainer import Trainer, make_trainer
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.device import GIB, compute_dtype, peak_memory, pick_device
from lcmdistill.utils.runtime import thread_environment

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
RESULTS = HERE / "results"
PARTS = ("VAE and text encoder", "teacher", "target", "student, forward and backward", "clip, AdamW, EMA", "the rest")
SIDES = {"naive": "plain loop", "product": "lcmdistill", "answers": "lcmdistill, data.teacher_cache_samples=1"}
# Rates at which rounding does not grow: at the tiny teacher's own 1e-4 AdamW takes it to 2e-3 of loss within 50 steps.
TINY = {"teacher.model": "tiny", "optim.batch_size": 16, "optim.learning_rate": 1e-5, "data.max_samples": 1024}
FULL_SIZE = {
    "optim.batch_size": 16,
    "optim.gradient_accumulation_steps": 1,
    "optim.learning_rate": 1e-7,
    "run.memory": "off",
    "run.precision": "bf16",
}


class Clock:
    """Seconds of each part, by its name; a GPU's own, told by events in its stream, so that nothing waits for anything."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._one_at_a_time = threading.Lock()
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str, share: float = 1.0) -> Iterator[None]:
        """Time a part. share: what of the machine it has, beside other threads."""
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
        """Until the device has nothing left to do, and all parts are counted."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for part, first, last in self._events:
            self.seconds[part] += first.elapsed_time(last) / 1000
        self._events.clear()


def settings(name: str, **more: Any) -> RunConfig:
    """A benchmark's configuration."""
    own = TINY if name == "tiny" else {"teacher.model": name, **FULL_SIZE}
    values = {**own, "run.output": tempfile.mkdtemp(), "optim.max_train_steps": 10**6, **more}
    return resolve({}, values, objectives=OBJECTIVES)


def teacher_of(name: str, device: torch.device) -> Teacher:
    """The bundled teacher, or a full-size one with random weights."""
    if name == "tiny":
        return load_teacher("tiny")
    from memory import full_size

    torch.manual_seed(0)
    teacher = full_size(name, str(device))
    for parameter in teacher.network.parameters():
        parameter.mul_(0.5)  # far from overflow; speed and memory do not depend on them
    return teacher


def product(name: str, device: torch.device, **more: Any) -> tuple[Trainer, Teacher]:
    """A run of the product at its first step, its caches warm."""
    config, teacher = settings(name, **more), teacher_of(name, device)
    if name == "tiny":
        folder = prepare(make_source("tiny"), config.data, teacher, config.run.seed)
        dataset: Any = LatentDataset([folder], [config.data.max_samples])
    else:
        from memory import Latents

        dataset = Latents(teacher, config.data.resolution)
    return make_trainer(config, Path(config.run.output or ""), make_accelerator(config), teacher, dataset), teacher


def images_and_draws(name: str, config: RunConfig, teacher: Teacher) -> Iterator[Draws]:
    """The product's own samples and draws, for the loop that reads its images anew every time; random images of full size."""
    seed, side, batch, schedule = config.run.seed, config.data.resolution, config.optim.batch_size, teacher.schedule
    size, members = 64, []
    if name == "tiny":
        size, members = config.data.max_samples or 0, list(make_source("tiny", seed=seed).members())
    z = teacher.example(1, side, "cpu")[0].shape[1:]
    order = SampleOrder(size, seed, batch)
    # Once: a public script's workers read while it computes.
    any_pixels = torch.empty(0) if members else torch.rand(batch, 3, side, side) * 2 - 1
    for step in range(10**6):
        rng = Rng(seed, step, range(batch))
        if members:
            judged = [check_sample(members[i], config.data, seed, i) for i in order.indices(step, rng.places)]
            samples = [sample for sample in judged if isinstance(sample, Sample)]
            pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
            captions = [sample.caption for sample in samples]
        else:
            pixels, captions = any_pixels, [""] * batch
        t, s = config.objective.sample_timesteps(schedule, rng)
        omega = sample_omega("baked", config.objective.w_min, config.objective.w_max, rng)
        assert omega is not None
        latents = None if members else torch.zeros(batch, *z)  # as the product's, which has no VAE to ask
        yield Draws(pixels, captions, rng.normal("posterior", z), rng.normal("noise", z), t, s, omega, latents)


def naive(name: str, device: torch.device, config: RunConfig, clock: Any) -> Iterator[float]:
    """The plain loop on the product's samples."""
    teacher = teacher_of(name, device)
    teacher.network.to(device)
    teacher.vae.to(device)
    alphas = teacher.schedule.alpha(torch.arange(teacher.schedule.num_steps)).flatten()

    def encode(captions: list[str]) -> dict[str, Tensor]:
        told = teacher.encode_prompts(captions)
        if name == "sdxl":
            _, _, example = teacher.example(1, config.data.resolution, "cpu")
            told = example.expand(len(captions)) | told
        return dict(told.to(device).values)

    return naive_steps(
        teacher.network,
        teacher.vae,
        teacher.call,
        encode,
        alphas**2,
        images_and_draws(name, config, teacher),
        lora=config.student.rank if config.student.kind == "lora" else None,
        learning_rate=config.optim.learning_rate,
        mu=config.objective.ema_decay_at(0),
        dtype=compute_dtype(config.run.precision, device),
        clock=clock,
    )


def timed_product(trainer: Trainer, clock: Clock) -> Iterator[float]:
    """The product's loop, its parts timed: what is around the networks is the rest."""

    step: Any = trainer.train_step
    ahead = trainer.order if isinstance(trainer.order, Prefetcher) else None
    half = 1.0 if ahead is None else 0.5

    def timed(part: str, function: Callable[..., Any], share: float = half) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock(part, share):
                return function(*args, **kwargs)

        return call

    accelerator = trainer.accelerator
    step.teacher = replace(step.teacher, network=timed("teacher", step.teacher.network))
    step.target_network = timed("target", step.target_network)
    step.student_network = timed("student, forward and backward", step.student_network)
    # Backward pass and optimizer run while the teacher does, or have all cores.
    update, alone = "clip, AdamW, EMA", half if ahead is not None and ahead.has_teacher else 1.0
    accelerator.backward = timed("student, forward and backward", accelerator.backward, alone)
    accelerator.clip_grad_norm_ = timed(update, accelerator.clip_grad_norm_, alone)
    step.optimizer.step = timed(update, step.optimizer.step, alone)
    object.__setattr__(step.student, "follow", timed(update, step.student.follow, alone))
    for loss, _ in trainer.steps():
        if ahead is not None:  # whatever is asked for the next step belongs to this one's time
            ahead.frozen.submit(int).result()
        yield loss.item() if trainer.step % 10 == 0 else loss  # pyright: ignore[reportReturnType]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, here and now."""
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
    """The most bytes held at once: of a GPU's tensors, or of the whole process on a CPU."""
    return peak_memory(device) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_flops(config: RunConfig, teacher: Teacher) -> float:
    """Of the six forwards' worth that a step is: student 3, teacher 2, target 1. Counted of the teacher's network: a student's
    omega input adds next to nothing."""
    z, t, c = teacher.example(config.optim.batch_size, config.data.resolution, "meta")
    with torch.device("meta"):
        network = type(teacher.network).from_config(teacher.network.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.call(network, z, t, c.values, None)
    forwards = config.objective.num_forwards
    return counter.get_total_flops() * (3 * forwards["student"] + forwards["teacher"] + forwards["target"])


def one_side(side: str, name: str, given: dict[str, Any]) -> None:
    """One side in a process of its own, as its users run it: a step for each line that is read, and told in one of JSON."""
    device = pick_device("auto" if name != "tiny" else "cpu")
    clock, out = Clock(device), sys.stdout
    sys.stdout = sys.stderr
    told = {"run.device": str(device), **({"data.teacher_cache_samples": 1} if side == "answers" else {}), **given}
    facts: dict[str, Any] = {}
    if side == "naive":
        config = settings(name, **told)
        steps = naive(name, device, config, clock)
    else:
        trainer, teacher = product(name, device, **told)
        config, steps = trainer.config, timed_product(trainer, clock)
        facts["flops"] = step_flops(config, teacher)
    dtype = compute_dtype(config.run.precision, device)
    for line in sys.stdin:
        if line == "forget\n":
            clock.seconds.clear()
            continue
        rate = matmul_rate(device, dtype) if side == "product" else 0.0
        began = time.perf_counter()
        loss = next(steps)
        clock.wait()
        seconds = time.perf_counter() - began
        facts |= {"peak": most_held(device), "parts": dict(clock.seconds)}
        told_now = {"seconds": seconds, "loss": float(loss), "rate": rate, **facts}
        print(json.dumps(told_now), file=out, flush=True)


def compare(name: str, rounds: int, given: dict[str, Any]) -> dict[str, Any]:
    """All sides in turn, `rounds` steps each. given: settings besides the benchmark's own."""
    if name != "tiny" and not torch.cuda.is_available():
        raise SystemExit(f"BENCH={name} needs a CUDA GPU, and torch sees none here")
    config = settings(name, **given)
    names = list(SIDES) if name == "tiny" else ["naive", "product"]  # random images have no answers to keep
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__, "side"]
    sides: dict[str, Any] = {}
    for side in names:
        # What the command line sets before it loads torch.
        environment = dict(os.environ) if side == "naive" else thread_environment(os.environ)
        sides[side] = subprocess.Popen([*command, side, name, json.dumps(given)], env=environment, **pipes)

    def step(side: str) -> dict[str, Any]:
        process = sides[side]
        process.stdin.write("step\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    warm = 3
    losses = {side: [step(side)["loss"] for _ in range(warm)] for side in names}
    for process in sides.values():
        process.stdin.write("forget\n")
    told: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(rounds):
        for side in names:
            told[side].append(step(side))
            losses[side].append(told[side][-1]["loss"])
        print(f"\r{number + 1}/{rounds}", end="", flush=True)
    print()
    for process in sides.values():
        process.stdin.close()
        process.wait()
    rate, flops = sum(each["rate"] for each in told["product"]) / rounds, told["product"][0]["flops"]
    seconds = {side: sum(each["seconds"] for each in told[side]) for side in names}
    found = {}
    for side in names:
        parts = told[side][-1]["parts"]
        parts["the rest"] = seconds[side] - sum(parts.values())
        done = flops * rounds * (4 / 6 if side == "answers" else 1)
        found[side] = {
            "samples_per_s": config.optim.batch_size * rounds / seconds[side],
            "ratio": seconds["naive"] / seconds[side],
            "of_matmul": done / seconds[side] / rate,
            "peak": told[side][-1]["peak"],
            "milliseconds": {part: 1000 * parts.get(part, 0.0) / rounds for part in PARTS},
        }
    device = pick_device("auto" if name != "tiny" else "cpu")
    return {
        "name": name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "dtype": str(compute_dtype(config.run.precision, device)).removeprefix("torch."),
        "batch": config.optim.batch_size,
        "rounds": rounds,
        "matmul_gflops": rate / 1e9,
        "step_gflop": flops / 1e9,
        "loss_apart": max(abs(a - b) for a, b in zip(losses["naive"], losses["product"], strict=True)),
        "losses": losses,
        "sides": found,
    }


# -- memory, each in a process of its own ----------------------------------------------------------------------------


def alone(side: str, name: str, kind: str, batches: list[int]) -> None:
    """Two steps of one side at each batch size; prints `most_held`, null for what did not fit. On a CPU only one size can be
    told, for a process does not forget."""
    device, peaks = pick_device("auto"), []
    told: dict[str, Any] = {"run.device": str(device), "student.kind": kind, "run.compile": "off"}
    if device.type == "cpu":  # 64 px, or it would be hours; weights are what counts in a LoRA's memory
        told |= {"data.resolution": 64, "run.precision": "fp32"}
    for batch in batches:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        peak_memory(device, reset=True)
        try:
            take_two_steps(side, name, device, {**told, "optim.batch_size": batch})
            peaks.append(most_held(device))
        except torch.OutOfMemoryError:
            peaks.append(None)
    print(json.dumps(peaks))


def take_two_steps(side: str, name: str, device: torch.device, told: dict[str, Any]) -> None:
    """By then everything is there that a step needs."""
    if side == "naive":
        steps = naive(name, device, settings(name, **told), untimed)
    else:
        trainer, _ = product(name, device, **told)
        steps = (float(loss) for loss, _ in trainer.steps())
    for _ in range(2):
        next(steps)


def memory() -> Iterator[dict[str, Any]]:
    """Peaks of both sides: on a CPU of a LoRA at SD 1.5's shapes, on a GPU of all that fits it. All that is known so far, each
    time that more is."""
    cuda = torch.cuda.is_available()
    names, kinds, batches = (("sd15", "sdxl"), ("lora", "full"), [1, 4, 16]) if cuda else (("sd15",), ("lora",), [1])
    where = f"{torch.cuda.get_device_name()}, bf16, not compiled" if cuda else "CPU, 64 px, fp32, the whole process"
    rows: list[list[Any]] = []
    for name, kind in itertools.product(names, kinds):
        peaks = {}
        for side in ("naive", "product"):
            command = [sys.executable, __file__, "alone", side, name, kind, *map(str, batches)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[side] = json.loads(done.stdout.splitlines()[-1])
        rows += [[name, kind, *row] for row in zip(batches, peaks["naive"], peaks["product"], strict=True)]
        yield {"name": "memory-cuda" if cuda else "memory-cpu", "device": where, "rows": rows}


# -- tables and picture ----------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """A result as markdown."""
    if "rows" in found:
        lines = [
            f"Peak memory, GiB ({found['device']}):\n",
            "| | batch | plain loop | lcmdistill | ratio |",
            "|---|---|---|---|---|",
        ]
        for name, kind, batch, one, other in found["rows"]:
            cells = [f"{value / GIB:.2f}" if value else "does not fit" for value in (one, other)]
            cells.append(f"{other / one:.2f}" if one and other else "")
            lines.append(f"| {name} {kind} | {batch} | {' | '.join(cells)} |")
        return "\n".join(lines)
    mean = {side: sum(losses) / len(losses) for side, losses in found["losses"].items()}
    lines = [
        f"{found['name']}, {found['device']}, {found['dtype']}, batch {found['batch']}, {found['rounds']} steps each in turn; "
        f"mean loss {mean['product']:.6f}, the plain loop's {mean['naive']:.6f}, at most {found['loss_apart']:.1e} apart:\n",
        "| | samples/s | times the plain loop | of the matmul rate | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for side, its in found["sides"].items():
        cells = f"{its['samples_per_s']:.1f} | {its['ratio']:.2f} | {its['of_matmul']:.0%} | {its['peak'] / GIB:.1f}"
        lines.append(f"| {SIDES[side]} | {cells} |")
    names = [SIDES[side] for side in found["sides"]]
    lines += ["", f"| milliseconds of a step | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for part in PARTS:
        cells = [f"{its['milliseconds'][part]:.0f}" for its in found["sides"].values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: dict[str, Any], path: Path) -> None:
    """Where a step's time goes, a bar a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    sides = list(found["sides"])[::-1]
    left = [0.0] * len(sides)
    for part, colour in zip(PARTS, ("#8c564b", "#1f77b4", "#17a2a2", "#e07b1a", "#7f7f7f", "#c8c8c8"), strict=True):
        widths = [found["sides"][side]["milliseconds"][part] for side in sides]
        axes.barh([SIDES[side] for side in sides], widths, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(f"milliseconds a step of {found['batch']} samples, {found['device']}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def write_tables() -> None:
    """README.md's part between its markers, of all results that there are."""
    readme, marker = HERE / "README.md", "<!-- measured -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(marker)
    _, _, after = rest.partition(marker)
    order = sorted(RESULTS.glob("*.json"), key=lambda path: ("memory" in path.stem, path.stem))
    tables = "\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in order)
    write_text(readme, f"{before}{marker}\n\n{tables}\n\n{marker}{after}")


def main() -> None:
    if sys.argv[1:2] == ["alone"]:
        side, name, kind, *batches = sys.argv[2:]
        return alone(side, name, kind, [int(batch) for batch in batches])
    if sys.argv[1:2] == ["side"]:
        side, name, given = sys.argv[2:]
        return one_side(side, name, json.loads(given))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="tiny", choices=["tiny", "sd15", "sdxl", "memory"])
    parser.add_argument("--rounds", type=int, default=50, help="steps of each side")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of both sides, as far as the plain loop knows it, such as run.precision=fp32; implies --dry",
    )
    arguments = parser.parse_args()
    given = dict(parse_assignment(text) for text in arguments.set)
    if given and arguments.name == "memory":
        parser.error("--set is for speed; memory has settings of its own")
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    for found in memory() if arguments.name == "memory" else [compare(arguments.name, arguments.rounds, given)]:
        print(table(found), flush=True)
        if arguments.dry or given:
            continue
        write_text(RESULTS / f"{found['name']}.json", json.dumps(found, indent=1) + "\n")
        write_tables()
        if "sides" in found:
            picture(found, HERE / f"{found['name']}.png")
    return None


if __name__ == "__main__":
    main()
