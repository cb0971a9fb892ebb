"""Build what a run needs: data, networks, optimizer."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import cache_root, mark_complete, prepare
from lcmdistill.data.teacher_cache import TeacherOutputCache, precompute
from lcmdistill.diffusion.types import Networks, x0_eps_network
from lcmdistill.evaluation.metrics.pretrained import perceptual_distance
from lcmdistill.students.build import make_student
from lcmdistill.students.student import Student, raw_network
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.checkpoint import CheckpointWriter
from lcmdistill.training.compile import compile_blocks, should_compile
from lcmdistill.training.distributed import Accelerator
from lcmdistill.training.memory.estimate import Breakdown
from lcmdistill.training.optimizer import make_optimizer
from lcmdistill.training.side_by_side import Ahead, division
from lcmdistill.training.signals import Stop
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.logging import Progress, progress
from lcmdistill.utils.runtime import configure_training

logger = logging.getLogger(__name__)

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
    models: Networks
    optimizer: Any
    writer: CheckpointWriter
    step: int = 0
    "optimiser steps done"
    unlogged: list[Tensor] = field(default_factory=list)
    "the losses since the last line of metrics"
    by_noise: Tensor = field(default_factory=lambda: torch.zeros(2, NOISE_BINS))
    "this process's samples since then, from clean to noise: sums of their losses, and how many there were"
    needed: Breakdown | None = None
    "the memory that a step was estimated to take"
    answers: TeacherOutputCache | None = None
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
        return optim.batch_size * optim.gradient_accumulation_steps * self.accelerator.num_processes


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
        {"teacher": teacher.fingerprint(with_network=True), "dtype": str(dtype)}
        if config.data.teacher_cache_samples
        else {}
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
    configure_training(device, networks)
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
    models = Networks(schedule, of_teacher, of_student, of_target, null, perceptual, has_dropout=student.has_dropout)
    answers = None
    if config.data.teacher_cache_samples:
        asked = precompute(
            cache_root(config.data),
            config.objective,
            models,
            raw_network(student.teacher),
            teacher.prediction_type,
            dataset,
            {**about, "data": [folder.name for folder in dataset.folders]},
            seed=config.run.seed,
            draws=config.data.teacher_cache_samples,
            caption_drop=config.data.caption_drop,
            batch_size=config.optim.batch_size,
            device=device,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            on_progress=on_asked,
        )
        accelerator.wait_for_everyone()
        answers = TeacherOutputCache(asked, len(dataset))
        if config.student.kind == "full":
            teacher.network.to("cpu")  # it is asked nothing more
    shapes = len(set(dataset.shapes or [()]))
    is_adapter = student.adapter is not None
    compiled = should_compile(config.run.compile, device, config.optim.max_train_steps, shapes, adapter=is_adapter)
    if compiled:
        compile_blocks(networks, shapes)
    side_by_side = None
    # Processes have the cores to themselves already, adapters are switched in a network that all threads would share, and
    # dropout draws from one generator.
    if device.type == "cpu" and not (accelerator.num_processes > 1 or is_adapter or student.has_dropout or compiled):
        parameters = sum(p.numel() for p in student.trainable.values())
        side_by_side = division(config.objective, models, parameters, asks=answers is None)
    by_noise = torch.zeros(2, NOISE_BINS, device=device)
    writer = CheckpointWriter(folder / "checkpoints", config.run.keep_checkpoints)
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


def prepare_data(config: RunConfig, teacher: Teacher, accelerator: Accelerator, stop: Stop) -> list[Path]:
    """The folders of every source's chunks, once all of them are there."""
    world, rank, folders = accelerator.num_processes, accelerator.process_index, []
    dtype = compute_dtype(config.run.precision, accelerator.device)
    for spec in config.data.sources:
        with progress(f"preparing {spec}", config.data.max_samples, enabled=rank == 0) as bar:
            tell, seed = progress_callback(f"preparing {spec}", bar, stop, loud=rank == 0), config.run.seed
            folders.append(
                prepare(spec, config.data, teacher, seed, dtype=dtype, rank=rank, world=world, on_progress=tell)
            )
    accelerator.wait_for_everyone()
    if rank == 0:
        for folder in folders:
            mark_complete(folder, config.data.max_samples)
    return folders


def progress_callback(what: str, bar: Progress, stop: Stop, *, loud: bool) -> Callable[[int], None]:
    """To be told how far something is: shows it, in lines where there is no bar, and stops where an end was asked for."""
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        stop.check(f"stopped while {what}; what is done is kept, and the same command goes on")
        bar.update(done)
        if loud and not bar.visible and time.monotonic() - last > 10:
            logger.info(f"{what}: {done} samples")
            last = time.monotonic()

    return tell
