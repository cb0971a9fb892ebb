"""What a run costs, before it starts: time of every phase, disk space, memory. --dry-run and every run log the same lines."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lcmdistill.config.lora_words import with_loras
from lcmdistill.config.schema import RunConfig
from lcmdistill.data.buckets import bucket_sizes
from lcmdistill.data.sources.base import Source
from lcmdistill.data.survey import SourceReport
from lcmdistill.objectives.recorded import resumable_config
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.naming import PREDICTED
from lcmdistill.training.compile import should_compile
from lcmdistill.training.cost_disk import DiskItem, checkpoint_bytes, disk_items, result_bytes
from lcmdistill.training.cost_time import (
    ENCODING,
    ENCODING_PROMPTS,
    GENERATING,
    ORDER,
    STARTING,
    TRAINING,
    VALIDATION,
    WRITING,
    Phase,
    SourceSamples,
    TimeLeft,
    measure_rates,
    phases,
    samples_of,
    steps_left,
    validations_left,
    with_read_seconds,
)
from lcmdistill.training.memory.estimate import Breakdown, step_memory
from lcmdistill.training.memory.plan import Plan, log_plan
from lcmdistill.utils import runtime
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.run_dir import free_space
from lcmdistill.utils.units import counted, duration_text, size_text

logger = logging.getLogger(__name__)

COMPILED = "; compiled at the first step, which takes minutes that are not in it"

MOST_PASSES = 50
"passes over the data above which a run is warned"


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        needed: The memory of a step.
        samples: The samples of each source.
        phases: Its phases in order, with their seconds.
        items: What it writes.
        passes: How often it visits each sample.
    """

    needed: Breakdown
    samples: Sequence[SourceSamples]
    phases: Sequence[Phase]
    items: Sequence[DiskItem]
    passes: float

    @property
    def seconds(self) -> float:
        """The estimated time of all phases."""
        return sum(phase.seconds for phase in self.phases)

    def of(self, name: str) -> float:
        """Return the estimated seconds of a phase."""
        return sum(phase.seconds for phase in self.phases if phase.name == name)

    def after(self, name: str) -> float:
        """Return the estimated seconds of all phases after one of ORDER."""
        return sum(map(self.of, ORDER[ORDER.index(name) + 1 :]))

    def after_source(self, index: int) -> float:
        """Return the estimated seconds of what follows the preparation of a source: the other sources, and later phases."""
        seconds = self.after(ENCODING)
        for generated, name in ((True, self._of_prompts), (False, ENCODING)):
            missing = [each.missing if each.generated == generated else 0 for each in self.samples]
            seconds += self.of(name) * sum(missing[index + 1 :]) / max(1, sum(missing))
        return seconds

    def time_left(self, config: RunConfig) -> TimeLeft:
        """Return what the training loop needs to estimate the time left."""
        validations = validations_left(config, config.optim.max_train_steps - steps_left(config))
        return TimeLeft(config, self.of(VALIDATION) / max(1, validations), self.of(WRITING))

    @property
    def _of_prompts(self) -> str:
        return GENERATING if self.of(GENERATING) else ENCODING_PROMPTS


def estimate_cost(
    config: RunConfig,
    teacher: Teacher,
    sources: Sequence[Source],
    device: torch.device,
    *,
    plan: Plan | None = None,
    reports: Sequence[SourceReport] | None = None,
    world: int = 1,
    started: float | None = None,
) -> Cost:
    """Estimate what a run costs. The teacher is moved to the device.

    Args:
        config: The resolved configuration.
        teacher: The teacher.
        sources: The run's sources.
        device: The device of the run.
        plan: The memory plan, if there is one.
        reports: What became of each source's members, if they were looked at.
        world: The number of processes.
        started: Seconds that a run spends before it comes here, and now is still to spend; None if they are over.
    """
    began = runtime.clock()
    dtype = compute_dtype(config.run.precision, device)
    needed = plan.needed if plan else step_memory(config, teacher, dtype, world=world)
    samples = with_read_seconds(samples_of(sources, config, teacher, reports), sources, config.data, teacher)
    rates = None
    try:
        teacher.to(device)
        rates = measure_rates(config, teacher, device, dtype, needed.trainable)
    except torch.OutOfMemoryError:
        logger.warning("time: not estimated, because a pass of the teacher in fp32 does not fit on the device")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    measuring = runtime.clock() - began
    written = checkpoint_bytes(needed) + result_bytes(config, teacher, needed)
    optim = config.optim
    visited = optim.max_train_steps * optim.batch_size * optim.gradient_accumulation_steps * world
    found = phases(config, teacher, samples, rates, written=written, world=world) if rates else []
    if found and started is not None:
        found = [Phase(STARTING, started + measuring, "imports, checks, loading the teacher, measuring it"), *found]
    sizes = len(bucket_sizes(config.data, teacher.multiple)) if config.data.buckets else 1
    is_adapter = config.student.kind == "lora"
    if should_compile(config.run.compile, device, optim.max_train_steps, sizes, adapter=is_adapter):
        found = [replace(each, note=f"{each.note}{COMPILED}") if each.name == TRAINING else each for each in found]
    return Cost(
        needed=needed,
        samples=samples,
        phases=found,
        items=disk_items(config, teacher, needed, samples),
        passes=visited / max(1, sum(each.total for each in samples)),
    )


def log_summary(config: RunConfig, teacher: Teacher, cost: Cost, plan: Plan | None, *, world: int = 1) -> None:
    """Log what is trained from what, and what it costs.

    Args:
        config: The resolved configuration.
        teacher: The teacher.
        cost: What the run costs.
        plan: The memory plan, if there is one.
        world: The number of processes.
    """
    needed, optim, info = cost.needed, config.optim, config.objective.info
    is_lora = config.student.kind == "lora"
    student = f"a LoRA of rank {config.student.rank}" if is_lora else "a full network"
    predicted = PREDICTED.get(teacher.prediction_type, teacher.prediction_type)
    logger.info(
        f"teacher: {with_loras(config.teacher.model, config.teacher.loras)}, {predicted}-predicting "
        f"{teacher.family.network_label} of {needed.base:,} parameters; the student, {student}, trains {needed.trainable:,}"
    )
    if skip := config.teacher.clip_skip:
        theirs = teacher.family.a1111_clip_skip(skip)
        logger.info(f"clip skip: {skip}, counted as in diffusers; A1111 and kohya call this {theirs}")
    logger.info(f"method: {info.title} ({config.objective_name}; {info.paper}), {info.describe(config.objective)}")
    size = " x ".join(
        [f"batch {optim.batch_size}", f"{optim.gradient_accumulation_steps} accumulated"]
        + [counted(world, "process", "processes")] * (world > 1)
    )
    logger.info(
        f"training: {counted(optim.max_train_steps, 'step')} ({size}) at {config.data.resolution} px, learning rate "
        f"{optim.learning_rate:g}: {cost.passes:.1f} passes over {counted(sum(s.total for s in cost.samples), 'sample')}"
    )
    if cost.passes > MOST_PASSES:
        logger.warning(
            f"warning: each sample is visited {cost.passes:.0f} times; the student may only learn these images: add --data or "
            "prompts (--data teacher), or lower --max-train-steps"
        )
    log_plan(plan or Plan(config, (), needed))
    if cost.phases:
        logger.info(f"time, estimated from a few passes on this device: {duration_text(cost.seconds)}")
    for phase in cost.phases:
        logger.info(f"  {phase.name:<25} {duration_text(phase.seconds):>12}  {phase.note}".rstrip())
    total, needed_bytes = sum(item.size for item in cost.items), sum(item.needed for item in cost.items)
    free = dict(free_space(item.folder) for item in cost.items)
    logger.info(
        f"disk: {size_text(total)} at the end, at most {size_text(needed_bytes)} more than now; "
        f"{' and '.join(size_text(space) for space in free.values())} free"
    )
    for item in cost.items:
        logger.info(f"  {item.name:<25} {size_text(item.size):>12}  {item.note}".rstrip())


def output_text(config: RunConfig) -> str:
    """Return the line that names the run folder and its state."""
    folder = Path(config.run.output or "")
    return f"output: {folder} ({'a run to resume' if resumable_config(folder) else 'new'})"
