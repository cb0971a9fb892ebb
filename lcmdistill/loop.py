"""The training loop: accumulate, backward, clip, step, update the target, yield. It knows no method, and writes nothing."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.batch import Batch, Models, Rng, x0_eps_network
from lcmdistill.checkpoint import Writer
from lcmdistill.compiling import compile_blocks, pays
from lcmdistill.data.answers import Answers, ask_teacher, which_draw
from lcmdistill.data.batches import batch_of, read_ahead
from lcmdistill.data.cache import LatentDataset, cache_root
from lcmdistill.data.order import SampleOrder
from lcmdistill.device import compute_dtype, keep_freed_memory
from lcmdistill.evaluate.weights import perceptual_distance
from lcmdistill.memory import Breakdown
from lcmdistill.objectives import Objective
from lcmdistill.objectives.shared import place_of
from lcmdistill.optimizer import learning_rate_at, make_optimizer
from lcmdistill.processes import Accelerator
from lcmdistill.settings import RunConfig
from lcmdistill.side_by_side import Ahead, division
from lcmdistill.student import Student, make_student, raw_network
from lcmdistill.teachers.base import Teacher

NOISE_BINS = 10
"parts of the way from clean to noise that the loss is told for"


@dataclass
class Run:
    """Everything that the loop touches."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    teacher: Teacher
    dataset: LatentDataset
    student: Student
    online: Any
    "the student's trainable module, wrapped for the processes it runs in"
    models: Models
    optimizer: Any
    writer: Writer
    step: int = 0
    "optimiser steps done"
    unlogged: list[Tensor] = field(default_factory=list)
    "the losses since the last line of metrics"
    by_noise: Tensor = field(default_factory=lambda: torch.zeros(2, NOISE_BINS))
    "this process's samples since then, from clean to noise: sums of their losses, and how many there were"
    needed: Breakdown | None = None
    "the memory that a step was estimated to take"
    answers: Answers | None = None
    "what the teacher was asked beforehand, if it was"
    compiled: bool = False
    "whether the first step compiles the networks"
    side_by_side: Ahead | None = None
    "how a CPU divides the micro-batches of a small network"
    waited: float = 0.0
    "seconds that the loop has waited for data since the last line of metrics"

    @property
    def global_batch(self) -> int:
        """Samples in one optimiser step, over all micro-batches and processes."""
        optim = self.config.optim
        return optim.batch_size * optim.accumulate * self.accelerator.num_processes


def build(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    teacher: Teacher,
    dataset: LatentDataset,
    on_asked: Callable[[int], None] = lambda done: None,
) -> Run:
    """A run at its first step: networks on their device, in the memory layout and the dtype that they compute in.

    on_asked: told how many answers the teacher has given, where they are kept.
    """
    device, dtype = accelerator.device, compute_dtype(config.run.precision, accelerator.device)
    # Before an adapter is among its weights, and before they are rounded.
    about = (
        {"teacher": teacher.fingerprint(with_network=True), "dtype": str(dtype)} if config.data.teacher_draws else {}
    )
    teacher.network.to(device)
    student = make_student(
        teacher,
        config.student,
        dtype=dtype,
        seed=config.run.seed,
        checkpointing=config.run.gradient_checkpointing,
        omega=config.objective.omega,
        same_dropout=config.objective.same_dropout,
    )
    networks = torch.nn.ModuleList([student.online, student.teacher, student.target])
    if device.type == "cuda":
        # What cuDNN's convolutions compute in; oneDNN's, on a CPU, have a layout of their own.
        networks.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        torch.backends.cudnn.benchmark = True  # shapes are few, and steps many
    elif device.type == "cpu":
        keep_freed_memory()
    optimizer = make_optimizer(config.optim, student.trainable.values(), device)
    online, optimizer = accelerator.prepare(student.online, optimizer)
    null = teacher.encode_prompts([""]).to(device)
    # From here on text encoder and VAE are needed for validation only.
    for part in teacher.pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part is not teacher.network:
            part.to("cpu")
    schedule = teacher.schedule.to(device)
    of_teacher, of_student, of_target = (
        x0_eps_network(raw_network(module), schedule, teacher.prediction_type)
        for module in (student.teacher, online, student.target)
    )
    perceptual = perceptual_distance(config.objective, device)
    models = Models(schedule, of_teacher, of_student, of_target, null, perceptual, has_dropout=student.has_dropout)
    answers = None
    if config.data.teacher_draws:
        asked = ask_teacher(
            cache_root(config.data),
            config.objective,
            models,
            raw_network(student.teacher),
            teacher.prediction_type,
            dataset,
            {**about, "data": [folder.name for folder in dataset.folders]},
            seed=config.run.seed,
            draws=config.data.teacher_draws,
            caption_drop=config.data.caption_drop,
            batch_size=config.optim.batch_size,
            device=device,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            on_progress=on_asked,
        )
        accelerator.wait_for_everyone()
        answers = Answers(asked, len(dataset))
        if config.student.kind == "full":
            teacher.network.to("cpu")  # it is asked nothing more
    shapes = len(set(dataset.shapes or [()]))
    is_adapter = student.adapter is not None
    compiled = pays(config.run.compile, device, config.optim.max_train_steps, shapes, adapter=is_adapter)
    if compiled:
        compile_blocks(networks, shapes)
    side_by_side = None
    # Processes have the cores to themselves already, adapters are switched in a network that all threads would share, and
    # dropout draws from one generator.
    if device.type == "cpu" and not (accelerator.num_processes > 1 or is_adapter or student.has_dropout or compiled):
        parameters = sum(p.numel() for p in student.trainable.values())
        side_by_side = division(config.objective, models, parameters, asks=answers is None)
    by_noise = torch.zeros(2, NOISE_BINS, device=device)
    writer = Writer(folder / "checkpoints", config.run.keep_checkpoints)
    return Run(
        config,
        folder,
        accelerator,
        teacher,
        dataset,
        student,
        online,
        models,
        optimizer,
        writer,
        by_noise=by_noise,
        answers=answers,
        compiled=compiled,
        side_by_side=side_by_side,
    )


def train_steps(run: Run, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
    """The loop: accumulate, backward, clip, step, update the target, yield (mean loss, gradient norm), on the device."""
    optim = run.config.optim
    accelerator, device = run.accelerator, run.accelerator.device
    parameters = list(run.student.trainable.values())
    micro_batches = _asked(run, objective, _read(run))

    def update() -> Tensor:
        # An infinite limit clips nothing and still measures.
        norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.student.follow(objective.mu(run.step))
        return torch.as_tensor(norm)

    while run.step < optim.max_train_steps:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, optim)
        total = torch.zeros((), device=device)
        for micro in range(optim.accumulate):
            rng, batch, models = next(micro_batches)
            last = micro == optim.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(run.online):
                each = _backward(run, objective, models, batch, rng)
            total += each.mean() / optim.accumulate
            t, _ = objective.pair(run.models.schedule, rng)
            run.by_noise += _binned(each, place_of(run.models.schedule, t))
        norm = _of_student(run, update)
        run.step += 1
        yield total, norm


def _backward(run: Run, objective: Objective, models: Models, batch: Batch, rng: Rng) -> Tensor:
    """Add the gradients of a micro-batch's share of the step's mean loss; returns each sample's loss, (B,)."""

    def whole() -> Tensor:
        models.seed_dropout(rng)
        each = objective.loss(models, batch, rng)
        run.accelerator.backward(each.mean() / run.config.optim.accumulate)
        return each.detach()

    return _of_student(run, whole)


def _of_student(run: Run, work: Callable[[], Tensor]) -> Tensor:
    """Do work of the student's, where the rest of its work is done."""
    return work() if run.side_by_side is None else run.side_by_side.student(work)


def _micro_batches(run: Run) -> Iterator[tuple[Rng, list[int]]]:
    """This process's micro-batches from the run's step to its end: their draws, and which samples they take."""
    optim, data, seed = run.config.optim, run.config.data, run.config.run.seed
    size = len(run.dataset)
    order = SampleOrder(size, seed, run.global_batch, run.dataset.shapes)
    for step in range(run.step, optim.max_train_steps):
        for micro in range(optim.accumulate):
            first = (micro * run.accelerator.num_processes + run.accelerator.process_index) * optim.batch_size
            places = range(first, first + optim.batch_size)
            indices = order.indices(step, places)
            kept = None
            if data.teacher_draws:
                kept = list(
                    zip(indices, which_draw(step, places, run.global_batch, size, data.teacher_draws), strict=True)
                )
            yield Rng(seed, step, places, run.accelerator.device, kept), indices


def _read(run: Run) -> Iterator[tuple[Rng, Batch]]:
    """The micro-batches, the next one read while one is computed; counts the time that is waited for them."""
    ahead, behind = itertools.tee(_micro_batches(run))
    reads = read_ahead(run.dataset, (indices for _, indices in ahead))
    for rng, _ in behind:
        began = time.monotonic()
        read = next(reads)
        run.waited += time.monotonic() - began
        yield rng, batch_of(read, rng, run.models.null, run.config.data.caption_drop)


def _asked(
    run: Run, objective: Objective, micro_batches: Iterator[tuple[Rng, Batch]]
) -> Iterator[tuple[Rng, Batch, Models]]:
    """Each with the networks that its loss is to ask."""
    answered = ((rng, batch, _answered(run, rng)) for rng, batch in micro_batches)
    return run.side_by_side.asked(objective, answered) if run.side_by_side is not None else answered


def _answered(run: Run, rng: Rng) -> Models:
    """The run's models, with a teacher that was asked beforehand, if it was."""
    if run.answers is None:
        return run.models
    assert rng.kept is not None
    raw = run.answers.teacher(rng.kept, run.accelerator.device)
    return replace(run.models, teacher=x0_eps_network(raw, run.models.schedule, run.teacher.prediction_type))


def _binned(losses: Tensor, noisiness: Tensor) -> Tensor:
    """Sums of losses, and how many, in each of NOISE_BINS, (2, NOISE_BINS). losses, noisiness: (B,)."""
    bins = torch.arange(NOISE_BINS, device=losses.device)
    member = (noisiness * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)[:, None] == bins
    return torch.stack([(member * losses[:, None]).sum(0), member.sum(0).to(losses.dtype)])
