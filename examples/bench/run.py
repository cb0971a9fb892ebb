"""Compare a training step with a plain loop like the public scripts': speed, memory, and where the time goes.

    make bench                            # BENCH=tiny: the bundled teacher on the CPU
    make bench BENCH=sd15                 # on a GPU: Stable Diffusion 1.5's shapes, random weights, 512 px; or sdxl
    python examples/bench/run.py memory   # peak memory of LoRA and full runs, each in a process of its own

The plain loop (naive.py) and lcmdistill run in separate processes and take steps in turn, on the same samples with the same
random draws. Other load on the machine so affects both alike, and the loss curves can be compared. Ratios are of the sums over
all rounds. Writes results/NAME.json, the tables of README.md, and a bar chart.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import Clock, matmul_rate, most_held, step_flops
from naive import Draws, naive_steps, untimed
from tables import PARTS, RESULTS, SIDES, picture, table, write_tables
from torch import Tensor

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
from lcmdistill.utils.device import compute_dtype, peak_memory, pick_device
from lcmdistill.utils.runtime import thread_environment

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
# Learning rates at which rounding does not grow: at the tiny teacher's usual 1e-4, the losses differ by 2e-3 after 50 steps.
TINY = {"teacher.model": "tiny", "optim.batch_size": 16, "optim.learning_rate": 1e-5, "data.max_samples": 1024}
FULL_SIZE = {
    "optim.batch_size": 16,
    "optim.gradient_accumulation_steps": 1,
    "optim.learning_rate": 1e-7,
    "run.memory": "off",
    "run.precision": "bf16",
}


def settings(name: str, **more: Any) -> RunConfig:
    """Return the configuration of a benchmark."""
    base = TINY if name == "tiny" else {"teacher.model": name, **FULL_SIZE}
    values = {**base, "run.output": tempfile.mkdtemp(), "optim.max_train_steps": 10**6, **more}
    return resolve({}, values, objectives=OBJECTIVES)


def teacher_of(name: str, device: torch.device) -> Teacher:
    """Load the bundled teacher, or make a full-size one with random weights."""
    if name == "tiny":
        return load_teacher("tiny")
    from memory import full_size

    torch.manual_seed(0)
    teacher = full_size(name, str(device))
    for parameter in teacher.network.parameters():
        parameter.mul_(0.5)  # far from overflow; speed and memory do not depend on them
    return teacher


def product(name: str, device: torch.device, **more: Any) -> tuple[Trainer, Teacher]:
    """Return an lcmdistill run at its first step, with warm caches."""
    config, teacher = settings(name, **more), teacher_of(name, device)
    if name == "tiny":
        folder = prepare(make_source("tiny"), config.data, teacher, config.run.seed)
        dataset: Any = LatentDataset([folder], [config.data.max_samples])
    else:
        from memory import Latents

        dataset = Latents(teacher, config.data.resolution)
    return make_trainer(config, Path(config.run.output or ""), make_accelerator(config), teacher, dataset), teacher


def images_and_draws(name: str, config: RunConfig, teacher: Teacher) -> Iterator[Draws]:
    """Yield lcmdistill's samples and draws for the plain loop, which decodes images at every step; random ones in full size."""
    seed, side, batch, schedule = config.run.seed, config.data.resolution, config.optim.batch_size, teacher.schedule
    size, members = 64, []
    if name == "tiny":
        size, members = config.data.max_samples or 0, list(make_source("tiny", seed=seed).members())
    z = teacher.example(1, side, "cpu")[0].shape[1:]
    order = SampleOrder(size, seed, batch)
    # Made once: the workers of a public script read images while it computes.
    any_pixels = torch.empty(0) if members else torch.rand(batch, 3, side, side) * 2 - 1
    for step in range(10**6):
        rng = Rng(seed, step, range(batch))
        if members:
            checked = [check_sample(members[i], config.data, seed, i) for i in order.indices(step, rng.places)]
            samples = [sample for sample in checked if isinstance(sample, Sample)]
            pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
            captions = [sample.caption for sample in samples]
        else:
            pixels, captions = any_pixels, [""] * batch
        t, s = config.objective.sample_timesteps(schedule, rng)
        omega = sample_omega("baked", config.objective.w_min, config.objective.w_max, rng)
        assert omega is not None
        latents = None if members else torch.zeros(batch, *z)  # as in lcmdistill, which does not call the VAE
        yield Draws(pixels, captions, rng.normal("posterior", z), rng.normal("noise", z), t, s, omega, latents)


def naive(name: str, device: torch.device, config: RunConfig, clock: Any) -> Iterator[float]:
    """Return the plain loop on lcmdistill's samples."""
    teacher = teacher_of(name, device)
    teacher.network.to(device)
    teacher.vae.to(device)
    alphas = teacher.schedule.alpha(torch.arange(teacher.schedule.num_steps)).flatten()

    def encode(captions: list[str]) -> dict[str, Tensor]:
        cond = teacher.encode_prompts(captions)
        if name == "sdxl":
            _, _, example = teacher.example(1, config.data.resolution, "cpu")
            cond = example.expand(len(captions)) | cond
        return dict(cond.to(device).values)

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
    """Yield the losses of lcmdistill's loop with its parts timed. Everything outside the networks is "the rest"."""

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
    # Backward pass and optimizer share the cores with the teacher, or have all of them.
    update, share = "clip, AdamW, EMA", half if ahead is not None and ahead.has_teacher else 1.0
    accelerator.backward = timed("student, forward and backward", accelerator.backward, share)
    accelerator.clip_grad_norm_ = timed(update, accelerator.clip_grad_norm_, share)
    step.optimizer.step = timed(update, step.optimizer.step, share)
    object.__setattr__(step.student, "follow", timed(update, step.student.follow, share))
    for loss, _ in trainer.steps():
        if ahead is not None:  # work ahead for the next step counts as time of this one
            ahead.frozen.submit(int).result()
        yield loss.item() if trainer.step % 10 == 0 else loss  # pyright: ignore[reportReturnType]


def one_side(side: str, name: str, given: dict[str, Any]) -> None:
    """Run one side in a process of its own: take a step per line of input, and print its numbers as a line of JSON."""
    device = pick_device("auto" if name != "tiny" else "cpu")
    clock, out = Clock(device), sys.stdout
    sys.stdout = sys.stderr
    changes = {"run.device": str(device), **({"data.teacher_cache_samples": 1} if side == "cached" else {}), **given}
    facts: dict[str, Any] = {}
    if side == "naive":
        config = settings(name, **changes)
        steps = naive(name, device, config, clock)
    else:
        trainer, teacher = product(name, device, **changes)
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
        numbers = {"seconds": seconds, "loss": float(loss), "rate": rate, **facts}
        print(json.dumps(numbers), file=out, flush=True)


def compare(name: str, rounds: int, given: dict[str, Any]) -> dict[str, Any]:
    """Run all sides in turn, `rounds` steps each. given: settings in addition to the benchmark's."""
    if name != "tiny" and not torch.cuda.is_available():
        raise SystemExit(f"BENCH={name} needs a CUDA GPU, and torch sees none here")
    config = settings(name, **given)
    names = list(SIDES) if name == "tiny" else ["naive", "product"]  # random images have no teacher outputs to cache
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__, "side"]
    sides: dict[str, Any] = {}
    for side in names:
        # The environment that the command line sets before it imports torch.
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
    numbers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(rounds):
        for side in names:
            numbers[side].append(step(side))
            losses[side].append(numbers[side][-1]["loss"])
        print(f"\r{number + 1}/{rounds}", end="", flush=True)
    print()
    for process in sides.values():
        process.stdin.close()
        process.wait()
    rate, flops = sum(each["rate"] for each in numbers["product"]) / rounds, numbers["product"][0]["flops"]
    seconds = {side: sum(each["seconds"] for each in numbers[side]) for side in names}
    result = {}
    for side in names:
        parts = numbers[side][-1]["parts"]
        parts["the rest"] = seconds[side] - sum(parts.values())
        done = flops * rounds * (4 / 6 if side == "cached" else 1)
        result[side] = {
            "samples_per_s": config.optim.batch_size * rounds / seconds[side],
            "ratio": seconds["naive"] / seconds[side],
            "of_matmul": done / seconds[side] / rate,
            "peak": numbers[side][-1]["peak"],
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
        "sides": result,
    }


# -- memory, each in a process of its own ----------------------------------------------------------------------------


def alone(side: str, name: str, kind: str, batches: list[int]) -> None:
    """Take two steps of one side at each batch size, and print `most_held`, null if it did not fit.

    On a CPU only one batch size can be measured per process, because the peak of a process cannot be reset.
    """
    device, peaks = pick_device("auto"), []
    changes: dict[str, Any] = {"run.device": str(device), "student.kind": kind, "run.compile": "off"}
    if device.type == "cpu":  # 64 px, because 512 px take hours; a LoRA's memory is mostly weights
        changes |= {"data.resolution": 64, "run.precision": "fp32"}
    for batch in batches:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        peak_memory(device, reset=True)
        try:
            take_two_steps(side, name, device, {**changes, "optim.batch_size": batch})
            peaks.append(most_held(device))
        except torch.OutOfMemoryError:
            peaks.append(None)
    print(json.dumps(peaks))


def take_two_steps(side: str, name: str, device: torch.device, changes: dict[str, Any]) -> None:
    """Take two steps, after which everything that a step needs is allocated."""
    if side == "naive":
        steps = naive(name, device, settings(name, **changes), untimed)
    else:
        trainer, _ = product(name, device, **changes)
        steps = (float(loss) for loss, _ in trainer.steps())
    for _ in range(2):
        next(steps)


def memory() -> Iterator[dict[str, Any]]:
    """Yield the peaks of both sides so far: on a CPU of a LoRA with SD 1.5's shapes, on a GPU of all models that fit."""
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
    for result in memory() if arguments.name == "memory" else [compare(arguments.name, arguments.rounds, given)]:
        print(table(result), flush=True)
        if arguments.dry or given:
            continue
        write_text(RESULTS / f"{result['name']}.json", json.dumps(result, indent=1) + "\n")
        write_tables()
        if "sides" in result:
            picture(result, HERE / f"{result['name']}.png")
    return None


if __name__ == "__main__":
    main()
