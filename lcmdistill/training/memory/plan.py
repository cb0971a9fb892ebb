"""`--memory`: which settings let a run fit, at the least cost in time, and why. The choice is a pure function."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.recorded import resumable_config
from lcmdistill.config.resolve import with_values
from lcmdistill.config.schema import RunConfig
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.memory.estimate import GIB, SLACK, Breakdown, optimizer_bytes, step_memory, usable
from lcmdistill.training.optimizer import has_eight_bits
from lcmdistill.utils.device import cap_memory, compute_dtype, peak_memory
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)


# What each measure costs, as a share of a step's time; moments of eight bits change the result, and so come last.
CHECKPOINTING, OFFLOADING, HALVING, EIGHT_BITS = 1 / 6, 0.1, 0.1, 10.0

WHY = {
    "run.gradient_checkpointing": "activations are computed again in the backward pass: about a sixth more time",
    "student.offload_target": "the EMA's fp32 weights rest on the CPU",
    "optim.batch_size": "smaller micro-batches, summed up to the same global batch",
    "optim.optimizer": "AdamW's moments in eight bits",
}


@dataclass(frozen=True)
class Plan:
    """config: with the settings that fit; changes: what was set, and why; needed: of that; room: bytes for it."""

    config: RunConfig
    changes: tuple[str, ...]
    needed: Breakdown
    room: float = math.inf

    @property
    def fits(self) -> bool:
        """Whether it is within the room."""
        return self.needed.total <= self.room


def choose_plan(config: RunConfig, needed: Callable[[RunConfig], Breakdown], room: float, *, eight_bits: bool) -> Plan:
    """The cheapest settings whose memory is within `room` bytes, else the smallest there are.

    needed: `step_memory` or what stands for it; eight_bits: whether the optimiser may be bitsandbytes'.
    """
    least: tuple[Breakdown, dict[str, Any]] | None = None
    for values in candidates(config, eight_bits=eight_bits):
        memory = needed(with_values(config, values))
        if memory.total <= room:
            return _plan(config, values, memory, room)
        if least is None or memory.total < least[0].total:
            least = memory, values
    assert least is not None  # the configuration as it is always is a candidate
    return _plan(config, least[1], least[0], room)


def candidates(config: RunConfig, *, eight_bits: bool) -> Iterator[dict[str, Any]]:
    """What may be changed, cheapest first: {} and every mix of the measures, with the same global batch throughout."""
    batch = config.optim.batch_size
    whole = batch * config.optim.gradient_accumulation_steps
    has_target = config.student.kind == "full" and config.student.target == "ema"
    mixes = product(
        [False] if config.run.gradient_checkpointing else [False, True],
        [False, True] if has_target and not config.student.offload_target else [False],
        [size for size in range(batch, 0, -1) if whole % size == 0],
        [False, True] if eight_bits and config.optim.optimizer == "adamw" else [False],
    )

    def cost(mix: tuple[bool, bool, int, bool]) -> float:
        again, away, size, coarse = mix
        return CHECKPOINTING * again + OFFLOADING * away + HALVING * math.log2(batch / size) + EIGHT_BITS * coarse

    for again, away, size, coarse in sorted(mixes, key=cost):
        values: dict[str, Any] = {"run.gradient_checkpointing": True} if again else {}
        values |= {"student.offload_target": True} if away else {}
        values |= {"optim.batch_size": size, "optim.gradient_accumulation_steps": whole // size} if size < batch else {}
        yield values | ({"optim.optimizer": "adamw8bit"} if coarse else {})


def _plan(config: RunConfig, values: dict[str, Any], memory: Breakdown, room: float) -> Plan:
    told = {k: v for k, v in values.items() if k != "optim.gradient_accumulation_steps"}
    changes = [f"{key} = {value}: {WHY[key]}" for key, value in told.items()]
    return Plan(with_values(config, values), tuple(changes), memory, room)


def estimator(asked: RunConfig, teacher: Teacher, dtype: torch.dtype, world: int) -> Callable[[RunConfig], Breakdown]:
    """`step_memory` for what `candidates` makes of a configuration, with as few steps as can be.

    What the weights take is known without one, and the memory of a micro-batch between the smallest and the largest lies
    below the line that joins theirs: it is the larger one of several that grow with the batch.
    """
    step = cache(lambda config: step_memory(config, teacher, dtype, world=world))

    def needed(config: RunConfig) -> Breakdown:
        optim, top = config.optim, asked.optim.batch_size
        # Gradients lie there before a backward pass or they do not: more micro-batches than two change nothing.
        plain = with_values(
            config,
            {
                "student.offload_target": False,
                "optim.optimizer": "adamw",
                "optim.gradient_accumulation_steps": min(optim.gradient_accumulation_steps, 2),
            },
        )
        if optim.batch_size in (1, top):
            memory = step(plain)
        else:
            one, most = (step(with_values(plain, {"optim.batch_size": size})) for size in (1, top))
            share = (optim.batch_size - 1) / (top - 1)
            between = round(one.activations + share * (most.activations - one.activations))
            memory = replace(one, activations=between)
        if config.student.offload_target:
            memory = replace(memory, target=memory.target * dtype.itemsize // 4)
        return replace(memory, optimizer=optimizer_bytes(optim.optimizer, memory.trainable))

    return needed


def plan_memory(
    config: RunConfig, teacher: Teacher, device: torch.device, *, free: float, world: int = 1, loud: bool = False
) -> Plan | None:
    """The plan that `run.memory` asks for; None if it asks for none. loud: whether to say that it is being made.

    free: bytes that the device has left, which `auto` goes by. A run that goes on with the memory it was planned for is left
    as it is, and one that is planned anew keeps its optimiser. Raises UsageError where nothing fits in what was said.
    """
    said = config.run.memory
    if said == "off" or (said == "auto" and device.type != "cuda"):
        return None
    if loud:
        logger.info("memory: working out what a step takes")  # half a minute for the largest networks
    dtype, before = compute_dtype(config.run.precision, device), resumable_config(Path(config.run.output or ""))
    needed = estimator(config, teacher, dtype, world)
    whole_card = said != "auto"
    room = usable(float(said) * GIB if whole_card else free, whole_card=whole_card)
    if whole_card:
        cap_memory(device, room * SLACK)
    if before.get("run.memory") == said:
        return Plan(config, (), needed(config), room)
    plan = choose_plan(config, needed, room, eight_bits=device.type == "cuda" and not before and has_eight_bits())
    if not plan.fits and whole_card:
        raise UsageError(
            f"--memory {said} leaves {room / GIB:.2f} GiB for tensors, and the least that this run needs is "
            f"{plan.needed.total / GIB:.2f} ({plan.needed}); lower --resolution{_smaller(config)}, or give it more"
        )
    return plan


def _smaller(config: RunConfig) -> str:
    return " or --rank" if config.student.kind == "lora" else ", train an adapter (lcmdistill distill-lora)"


def log_plan(plan: Plan) -> None:
    """Say what a run is estimated to take, what was picked so that it fits, and why."""
    said, room = plan.config.run.memory, f"{plan.room / GIB:.2f} GiB"
    verdict = f"; {said} leaves {room} for it" if plan.fits else f", which may not fit: {said} leaves {room} for it"
    estimated = f"memory, estimated: {plan.needed.total / GIB:.2f} GiB at the peak of a step ({plan.needed})"
    logger.info(estimated + (verdict if math.isfinite(plan.room) else ""))
    for change in plan.changes:
        logger.info(f"  {change}")


class MemoryCheck:
    """Says, after the second step, what a step was estimated to take and what it took: by then everything is there."""

    def __init__(self, needed: Breakdown | None, device: torch.device) -> None:
        self._needed, self._device, self._steps = needed, device, 0
        peak_memory(device, reset=True)

    def after_step(self) -> None:
        """To be told of every step."""
        self._steps += 1
        took = peak_memory(self._device) if self._steps == 2 else None
        if took is not None and self._needed is not None:
            estimated = self._needed.total
            logger.info(
                f"memory: {took / GIB:.2f} GiB at the peak of a step, estimated were {estimated / GIB:.2f} "
                f"({estimated / took - 1:+.0%})"
            )
