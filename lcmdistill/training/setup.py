"""Build what a run needs: its data, and the training step on its device."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.holdout import RunCaptions, hold_out, is_own, record_captions
from lcmdistill.data.latent_cache import cache_root, mark_complete, prepare
from lcmdistill.data.sources.base import Source
from lcmdistill.data.stream import SampleStream
from lcmdistill.data.survey import members_of, unused_samples
from lcmdistill.data.teacher_cache import TeacherOutputCache, precompute
from lcmdistill.objectives.recorded import resumable_config
from lcmdistill.students.build import make_student
from lcmdistill.students.student import Student, raw_network
from lcmdistill.students.warm_start import WORDS, put_start_lora, put_start_weights, start_lora, start_weights
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.compile import compile_blocks, should_compile
from lcmdistill.training.cost_time import ENCODING_PROMPTS, GENERATING, TEACHER_OUTPUTS
from lcmdistill.training.distributed import Accelerator
from lcmdistill.training.prefetch import InOrder, order_of_work
from lcmdistill.training.sharding import Replicas, make_sharing
from lcmdistill.training.signals import Stop
from lcmdistill.training.step_kinds import STEP_KINDS
from lcmdistill.training.train_step import ConsistencyStep, StepParts
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.logging import Progress, progress
from lcmdistill.utils.runtime import configure_training
from lcmdistill.utils.units import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltStep:
    """A training step on its device, how its work is ordered, and how the processes share its networks.

    is_compiled: whether the first step compiles.
    """

    train_step: Any
    order: InOrder
    sharing: Replicas
    is_compiled: bool


def build_train_step(
    config: RunConfig,
    accelerator: Accelerator,
    teacher: Teacher,
    dataset: LatentDataset | None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> BuiltStep:
    """Put the networks on their device, in the memory layout and dtype that they compute in.

    Args:
        config: The resolved configuration.
        accelerator: The processes and their device.
        teacher: The teacher; its network is moved, and cast or given adapters.
        dataset: The prepared samples; None where they are encoded while the run trains.
        on_progress: Called with the number of teacher outputs that are cached, if the configuration asks for any.
    """
    device, dtype = accelerator.device, compute_dtype(config.run.precision, accelerator.device)
    caches = config.data.teacher_cache_samples > 0
    # Before an adapter is among its weights, and before they are rounded.
    cache_key = {"teacher": teacher.fingerprint(with_network=True), "dtype": str(dtype)} if caches else {}
    sharing = make_sharing(config, accelerator)
    # Networks that are sharded are built on the CPU, and reach the device block by block.
    teacher.network.to("cpu" if sharing.is_sharded else device)
    start = config.student.start
    is_warm = start not in WORDS and resumable_config(Path(config.run.output or "")) is None
    given: Any = (start_lora if config.student.kind == "lora" else start_weights)(teacher, start) if is_warm else None
    student = make_student(
        teacher,
        config.student,
        dtype=dtype,
        seed=config.run.seed,
        checkpointing=config.run.gradient_checkpointing,
        omega=config.objective.omega,
        same_dropout=config.objective.same_dropout,
        critic=getattr(config.objective, "critic", None),
    )
    if given is not None and config.student.kind == "lora":
        put_start_lora(student, given, start, config.student.alpha)
    elif given is not None:
        put_start_weights(student, given)
    configure_training(device, torch.nn.ModuleList() if sharing.is_sharded else student.modules)
    student = sharing.distribute(student)
    parts = StepParts(
        objective=config.objective,
        student=student,
        optim=config.optim,
        sharing=sharing,
        schedule=teacher.schedule.to(device),
        null=teacher.encode_prompts([""]).to(device),
        prediction_type=teacher.prediction_type,
        applies_cfg=teacher.applies_cfg,
    )
    train_step = STEP_KINDS[config.objective.info.train_step].build(parts)
    if dataset is not None:  # from here on the encoders are needed for validation only
        for part in teacher.encoders:
            part.to("cpu")
    if dataset is not None and caches:
        cache_key |= {"data": [folder.name for folder in dataset.folders]}
        cache_key |= {"left_out": dataset.left_out} if dataset.left_out else {}
        train_step.teacher_outputs = _cached_outputs(
            config, accelerator, teacher, student, train_step, dataset, cache_key, on_progress
        )
        if config.student.kind == "full":
            teacher.network.to("cpu")  # it is not needed again
    shapes = len(set(dataset.shapes or [()])) if dataset is not None else 1
    is_adapter = student.adapter is not None
    is_compiled = not sharing.is_sharded and should_compile(
        config.run.compile, device, config.optim.max_train_steps, shapes, adapter=is_adapter
    )
    if is_compiled:
        compile_blocks(student.modules, shapes)
    order = order_of_work(
        sum(p.numel() for p in student.trainable.values()),
        device=device,
        has_teacher=not caches and config.objective.num_forwards["teacher"] > 0,
        # Several processes have the cores to themselves already, adapters are switched in a network that all threads would
        # share, and dropout draws from one generator.
        may_share=train_step.may_run_ahead
        and not (accelerator.num_processes > 1 or is_adapter or student.has_dropout or is_compiled),
    )
    train_step.student_network = order.student_network(train_step.student_network)
    return BuiltStep(train_step, order, sharing, is_compiled)


def _cached_outputs(
    config: RunConfig,
    accelerator: Accelerator,
    teacher: Teacher,
    student: Student,
    train_step: ConsistencyStep,
    dataset: LatentDataset,
    cache_key: Mapping[str, object],
    on_progress: Callable[[float], None],
) -> TeacherOutputCache:
    folder = precompute(
        cache_root(config.data),
        config.objective,
        raw_network(student.teacher),
        teacher.prediction_type,
        train_step.schedule,
        train_step.null,
        dataset,
        cache_key,
        seed=config.run.seed,
        draws=config.data.teacher_cache_samples,
        caption_drop=config.data.caption_drop,
        batch_size=config.optim.batch_size,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        on_progress=on_progress,
    )
    accelerator.wait_for_everyone()
    return TeacherOutputCache(folder, len(dataset), teacher.prediction_type)


def open_data(
    config: RunConfig,
    sources: Sequence[Source],
    teacher: Teacher,
    accelerator: Accelerator,
    stop: Stop,
    after: Callable[[int], float] = lambda index: 0.0,
) -> tuple[LatentDataset | SampleStream, RunCaptions]:
    """Return a run's samples, prepared by all processes, and the user's own captions that it is validated with.

    Args:
        config: The resolved configuration.
        sources: The run's sources.
        teacher: The teacher.
        accelerator: The processes.
        stop: The request to stop.
        after: Returns the seconds of what follows the source of an index.

    Raises:
        UsageError: No sample is usable.
    """
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if config.data.cache == "off":
        stream = SampleStream(sources, config.data, config.run.seed, teacher.rejects, rank=rank, world=world)
        if is_main:
            logger.info(
                "data.cache is off: samples are encoded while the run trains, and none are held out for validation"
            )
        return stream, RunCaptions()
    folders = _prepare_all(config, sources, teacher, accelerator, stop, after)
    dataset = LatentDataset(folders, [config.data.max_samples] * len(folders))
    if is_main:
        for source, report in zip(sources, dataset.reports, strict=True):
            unused = unused_samples(source, config.data, report, takes_prompts=not teacher.in_pixels)
            logger.info(f"data {source.label}: {report}{unused}")
    own, folder = [is_own(source) and not teacher.in_pixels for source in sources], Path(config.run.output or "")
    own_captions = hold_out(folder, dataset, own, config.data.holdout)
    accelerator.wait_for_everyone()
    if is_main:
        record_captions(folder, own_captions, len(dataset.left_out))
    if not len(dataset):
        raise UsageError("no usable training samples; run with --dry-run to see why")
    return dataset, own_captions


def _prepare_all(
    config: RunConfig,
    sources: Sequence[Source],
    teacher: Teacher,
    accelerator: Accelerator,
    stop: Stop,
    after: Callable[[int], float],
) -> list[Path]:
    """Return the folder of each source's prepared samples, once all processes have done their share."""
    world, rank, folders = accelerator.num_processes, accelerator.process_index, []
    dtype = compute_dtype(config.run.precision, accelerator.device)
    for index, source in enumerate(sources):
        members, left, seed = members_of(source, config.data), after(index), config.run.seed
        what = (
            ENCODING_PROMPTS
            if source.prompts_only
            else GENERATING
            if source.is_generated
            else f"encoding {source.label}"
        )
        with progress(what, members, enabled=rank == 0, after=left) as bar:
            report = progress_callback(what, bar, stop, loud=rank == 0)
            stopped = f"stopped while {what}; progress is saved, re-run the same command to continue"
            with stop.at_once(stopped):
                folders.append(
                    prepare(source, config.data, teacher, seed, dtype=dtype, rank=rank, world=world, on_progress=report)
                )
    accelerator.wait_for_everyone()
    if rank == 0:
        for folder in folders:
            mark_complete(folder, config.data.max_samples)
    return folders


@contextmanager
def caching_progress(
    config: RunConfig, samples: int, stop: Stop, *, loud: bool, after: float
) -> Iterator[Callable[[float], None]]:
    """Yield the callback that `build_train_step` calls while it caches teacher outputs; Ctrl-C stops it at once.

    Args:
        config: The resolved configuration.
        samples: The number of samples.
        stop: The request to stop.
        loud: Whether to show progress.
        after: The estimated seconds of what follows.
    """
    outputs = samples * config.data.teacher_cache_samples
    stopped = "stopped before training started; re-run the same command"
    if outputs:
        stopped = f"stopped while {TEACHER_OUTPUTS}; progress is saved, re-run the same command to continue"
    with (
        progress(TEACHER_OUTPUTS, outputs, enabled=loud and outputs > 0, after=after) as bar,
        stop.at_once(stopped),
    ):
        yield progress_callback(TEACHER_OUTPUTS, bar, stop, loud=loud)


def progress_callback(what: str, bar: Progress, stop: Stop, *, loud: bool) -> Callable[[float], None]:
    """Return a callback that shows progress, in lines where there is no bar, and ends the run after Ctrl-C."""
    last, most = time.monotonic(), 0.0

    def report(done: float) -> None:
        nonlocal last, most
        most = done = max(most, done)  # with buckets, samples are encoded size by size
        stop.check(f"stopped while {what}; progress is saved, re-run the same command to continue")
        bar.update(done)
        if loud and not bar.visible and time.monotonic() - last > 10:
            count = f"{int(done):,} of {counted(bar.total, 'sample')}" if bar.total else counted(int(done), "sample")
            logger.info(f"{what}: {count}{f', {bar.left_text}' if bar.left_text else ''}")
            last = time.monotonic()

    return report
