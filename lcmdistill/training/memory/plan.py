"""`--memory`: the settings with which a run fits, at the least cost in time. The choice is a pure function."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.resolve import with_values
from lcmdistill.config.schema import RunConfig, Shard
from lcmdistill.objectives.recorded import resumable_config
from lcmdistill.students.quantize import can_quantize
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.memory.estimate import (
    SLACK,
    Breakdown,
    in_shards,
    is_sharded,
    optimizer_bytes,
    quantized,
    step_memory,
    usable,
)
from lcmdistill.training.optimizer import has_bitsandbytes
from lcmdistill.training.sharding import shard_obstacle
from lcmdistill.utils.device import GIB, cap_memory, compute_dtype, peak_memory
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)


# The cost of each measure, as a share of a step's time. Shards communicate several times as much as copies: they come after
# all that one device can do. 8-bit moments and a quantized base change the result, and therefore come last.
CHECKPOINTING, OFFLOADING, HALVING, SHARDING, EIGHT_BIT_MOMENTS, QUANTIZING = 1 / 6, 0.1, 0.1, 1.0, 10.0, 20.0

REASONS = {
    "run.gradient_checkpointing": "activations are recomputed in the backward pass: about a sixth more time",
    "student.offload_target": "the EMA's fp32 weights are kept on the CPU",
    "optim.batch_size": "smaller micro-batches, accumulated to the same global batch",
    "run.shard": "weights, gradients and moments are divided over the processes, which send each other the weights in use",
    "optim.optimizer": "AdamW's moments in 8 bits",
    "student.quantize_base": "frozen linear layers in 8 bits: teacher and student change by the rounding, and steps are slower",
}


@dataclass(frozen=True)
class Plan:
    """Settings that fit.

    Attributes:
        config: The configuration with these settings.
        changes: The settings that were changed, each with the reason.
        needed: The memory of a step with these settings.
        room: The bytes of tensors that fit.
    """

    config: RunConfig
    changes: tuple[str, ...]
    needed: Breakdown
    room: float = math.inf

    @property
    def fits(self) -> bool:
        """Whether a step stays within the room."""
        return self.needed.total <= self.room


def choose_plan(
    config: RunConfig,
    needed: Callable[[RunConfig], Breakdown],
    room: float,
    *,
    allow_8bit: bool,
    allow_shards: bool = False,
    allow_int8: bool = False,
) -> Plan:
    """Return the cheapest settings whose memory is within `room` bytes; if none are, those with the least memory.

    Args:
        config: The configuration as requested.
        needed: `step_memory`, or a function that stands in for it.
        room: The bytes of tensors that fit.
        allow_8bit: Whether the optimizer may be that of bitsandbytes.
        allow_shards: Whether the weights may be divided over the processes.
        allow_int8: Whether the base of a LoRA may be quantized.
    """
    least: tuple[Breakdown, dict[str, Any]] | None = None
    for values in candidates(config, allow_8bit=allow_8bit, allow_shards=allow_shards, allow_int8=allow_int8):
        memory = needed(with_values(config, values))
        if memory.total <= room:
            return _plan(config, values, memory, room)
        if least is None or memory.total < least[0].total:
            least = memory, values
    assert least is not None  # the configuration itself is always a candidate
    return _plan(config, least[1], least[0], room)


def candidates(
    config: RunConfig, *, allow_8bit: bool, allow_shards: bool = False, allow_int8: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the possible changes, cheapest first: {} and every combination of measures, all with the same global batch."""
    batch = config.optim.batch_size
    samples = batch * config.optim.gradient_accumulation_steps
    has_target = config.student.kind == "full" and config.student.target == "ema"
    can_be_quantized = config.student.kind == "lora" and config.student.quantize_base == "none"
    combinations = product(
        [False] if config.run.gradient_checkpointing else [False, True],
        [False, True] if has_target and not config.student.offload_target else [False],
        [size for size in range(batch, 0, -1) if samples % size == 0],
        [False, True] if allow_8bit and config.optim.optimizer == "adamw" else [False],
        [False, True] if allow_shards else [False],
        [False, True] if allow_int8 and can_be_quantized else [False],
    )

    def cost(combination: tuple[bool, bool, int, bool, bool, bool]) -> float:
        recompute, offload, size, eight_bit, shard, quantize = combination
        in_time = CHECKPOINTING * recompute + OFFLOADING * offload + HALVING * math.log2(batch / size)
        return in_time + SHARDING * shard + EIGHT_BIT_MOMENTS * eight_bit + QUANTIZING * quantize

    for recompute, offload, size, eight_bit, shard, quantize in sorted(combinations, key=cost):
        if (shard or config.run.shard == Shard.full) and (offload or eight_bit or quantize):
            continue  # see `shard_obstacle`
        values: dict[str, Any] = {"run.gradient_checkpointing": True} if recompute else {}
        values |= {"student.offload_target": True} if offload else {}
        if size < batch:
            values |= {"optim.batch_size": size, "optim.gradient_accumulation_steps": samples // size}
        values |= {"run.shard": Shard.full} if shard else {}
        values |= {"student.quantize_base": "int8"} if quantize else {}
        yield values | ({"optim.optimizer": "adamw8bit"} if eight_bit else {})


def _plan(config: RunConfig, values: dict[str, Any], memory: Breakdown, room: float) -> Plan:
    changes = [f"{key} = {value}: {REASONS[key]}" for key, value in values.items() if key in REASONS]
    return Plan(with_values(config, values), tuple(changes), memory, room)


def estimator(
    requested: RunConfig, teacher: Teacher, dtype: torch.dtype, world: int
) -> Callable[[RunConfig], Breakdown]:
    """Return `step_memory` for all candidates of a configuration, with as few counted steps as possible.

    The memory of the weights follows without one. The memory of a micro-batch is the maximum of several that grow with its
    size; between the smallest and the largest size it therefore lies below the line that connects them.
    """
    step = cache(lambda config: step_memory(config, teacher, dtype, world=world))

    def needed(config: RunConfig) -> Breakdown:
        optim, largest = config.optim, requested.optim.batch_size
        # Gradients exist before a backward pass or they do not: more than two micro-batches make no difference.
        plain = with_values(
            config,
            {
                "student.offload_target": False,
                "run.shard": Shard.off,
                "student.quantize_base": "none",
                "optim.optimizer": "adamw",
                "optim.gradient_accumulation_steps": min(optim.gradient_accumulation_steps, 2),
            },
        )
        if optim.batch_size in (1, largest):
            memory = step(plain)
        else:
            one, most = (step(with_values(plain, {"optim.batch_size": size})) for size in (1, largest))
            share = (optim.batch_size - 1) / (largest - 1)
            between = round(one.activations + share * (most.activations - one.activations))
            memory = replace(one, activations=between)
        if config.student.offload_target:
            memory = replace(memory, target=memory.target * dtype.itemsize // 4)
        memory = replace(memory, optimizer=optimizer_bytes(optim.optimizer, memory.trainable + memory.critic // 4))
        memory = in_shards(memory, config, teacher, dtype, world) if is_sharded(config, world) else memory
        return quantized(memory, config, teacher, dtype)

    return needed


def plan_memory(
    config: RunConfig, teacher: Teacher, device: torch.device, *, free: float, world: int = 1, loud: bool = False
) -> Plan | None:
    """Return the plan that `run.memory` requests, or None if it requests none.

    A run that resumes with the same `run.memory` keeps its settings. One that resumes with another keeps its optimizer.

    Args:
        config: The configuration as requested.
        teacher: The teacher.
        device: The device of this process.
        free: The free bytes of the device, for `auto`.
        world: Number of processes.
        loud: Whether to log that the estimate is being made.

    Raises:
        UsageError: No settings fit in the requested memory.
    """
    memory = config.run.memory
    if memory == "off" or (memory == "auto" and device.type != "cuda"):
        return None
    if loud:
        logger.info("memory: estimating a training step")  # takes half a minute for the largest networks
    dtype, before = compute_dtype(config.run.precision, device), resumable_config(Path(config.run.output or ""))
    needed = estimator(config, teacher, dtype, world)
    whole_gpu = memory != "auto"
    room = usable(float(memory) * GIB if whole_gpu else free, whole_gpu=whole_gpu)
    if whole_gpu:
        cap_memory(device, room * SLACK)
    if before is not None and before.run.memory == memory:
        return Plan(config, (), needed(config), room)
    plan = choose_plan(
        config,
        needed,
        room,
        allow_8bit=device.type == "cuda" and not before and has_bitsandbytes(),
        allow_shards=world > 1 and config.run.shard == Shard.auto and shard_obstacle(config, device) is None,
        allow_int8=not before and can_quantize("int8"),
    )
    if not plan.fits and whole_gpu:
        raise UsageError(
            f"--memory {memory} leaves {room / GIB:.2f} GiB for tensors, and this run needs at least "
            f"{plan.needed.total / GIB:.2f} GiB ({plan.needed}); lower --resolution{_smaller(config)}, or raise --memory"
        )
    return plan


def _smaller(config: RunConfig) -> str:
    return " or --rank" if config.student.kind == "lora" else ", train an adapter (lcmdistill distill-lora)"


def log_plan(plan: Plan) -> None:
    """Log the estimated memory of a run, and the settings that were changed so that it fits."""
    room = f"run.memory = {plan.config.run.memory} leaves {plan.room / GIB:.2f} GiB for tensors"
    verdict = f"; {room}" if plan.fits else f", which may not fit: {room}"
    estimate = f"memory, estimated: {plan.needed.total / GIB:.2f} GiB at the peak of a step ({plan.needed})"
    logger.info(estimate + (verdict if math.isfinite(plan.room) else ""))
    for change in plan.changes:
        logger.info(f"  {change}")


class MemoryCheck:
    """Log, after the second step, the estimated and the measured memory: by then everything is allocated."""

    def __init__(self, needed: Breakdown | None, device: torch.device) -> None:
        self._needed, self._device, self._steps = needed, device, 0
        peak_memory(device, reset=True)

    def after_step(self) -> None:
        """Note the end of a step."""
        self._steps += 1
        measured = peak_memory(self._device) if self._steps == 2 else None
        if measured is not None and self._needed is not None:
            estimated = self._needed.total
            logger.info(
                f"memory: {measured / GIB:.2f} GiB at the peak of a step (estimated {estimated / GIB:.2f} GiB, "
                f"{estimated / measured - 1:+.0%})"
            )
