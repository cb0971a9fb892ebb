"""What a method does in one optimizer step. The Trainer knows no method: it is given a TrainStep.

Shapes: B micro-batch, C h w latents.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig
from lcmdistill.data.teacher_cache import TeacherOutputCache
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng, seed_dropout
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, TeacherNetwork, x0_eps_network
from lcmdistill.objectives.base import Objective, State
from lcmdistill.objectives.common import noise_level_fraction
from lcmdistill.students.student import Student, raw_network
from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.training.optimizer import learning_rate_at, make_optimizer
from lcmdistill.training.sharding import Replicas
from lcmdistill.utils.errors import RunError

Phase = Callable[[str], contextlib.AbstractContextManager[None]]


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Time nothing."""
    return contextlib.nullcontext()


class Prepared(NamedTuple):
    """A micro-batch whose teacher's part is done. target: waits for the target network's part."""

    rng: Rng
    batch: Batch
    state: Any
    target: Callable[[], Any]


class StepReport(NamedTuple):
    """What an optimizer step reports; all tensors are on the device.

    Attributes:
        losses: The loss of each sample, (B,) fp32, of each micro-batch.
        noise_levels: The samples' noise levels as fractions of the schedule, from 0 (clean) to 1, of each micro-batch.
        norm: The gradient norm before clipping.
        numbers: Further numbers for a line of metrics, such as {"critic_loss": ...}; their means are logged.
    """

    losses: list[Tensor]
    noise_levels: list[Tensor]
    norm: Tensor
    numbers: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """The networks of a step as functions of (z, t, c, w) -> (x0, eps). critic: of methods that have one."""

    teacher: TeacherNetwork
    student: Network
    target: Network
    critic: Network | None = None


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """What a training step is built of.

    Attributes:
        objective: The method.
        student: The trained network and the networks that it is trained against.
        optim: The [optim] section.
        sharing: How the processes share the networks.
        schedule: The teacher's schedule, on the device.
        null: The empty prompt, B = 1, on the device.
        prediction_type: What the networks predict.
        applies_cfg: Whether the teacher's guidance is classifier-free.
    """

    objective: Any
    student: Student
    optim: OptimConfig
    sharing: Replicas
    schedule: NoiseSchedule
    null: Conditioning
    prediction_type: str
    applies_cfg: bool = True

    @property
    def teacher(self) -> TeacherNetwork:
        """The frozen teacher."""
        return TeacherNetwork(self.network(self.student.teacher), self.null, self.applies_cfg)

    def network(self, module: Any) -> Network:
        """Return a module as a function of (z, t, c, w) -> (x0, eps)."""
        return x0_eps_network(raw_network(module), self.schedule, self.prediction_type)

    def trained(self, module: Any, parameters: Iterable[Tensor], learning_rate: float) -> tuple[Any, Any]:
        """Return a module as its processes share it, and an optimizer of its parameters."""
        optim = replace(self.optim, learning_rate=learning_rate)
        device = self.sharing.accelerator.device
        return self.sharing.trained(module, make_optimizer(optim, parameters, device))


Run = Callable[[Callable[[], Tensor]], Tensor]
"runs the student's work where it belongs, such as in a thread of its own"

Rehearse = Callable[[Iterable[Tensor]], None]
"called with the parameters of a loss before its backward pass"


class TrainStep(Protocol):
    """One method's training step. It owns its networks, its optimizers and the tensors that a checkpoint holds.

    The Trainer calls `prepare` and `evaluate_target` for each micro-batch, possibly in another thread, and `take` once per
    optimizer step.
    """

    student: Student
    "what is sampled, validated and exported"
    may_run_ahead: ClassVar[bool]
    "whether `prepare` and `evaluate_target` do work that a thread of their own is worth"

    @property
    def null(self) -> Conditioning:
        """The empty prompt, B = 1, for captions that are dropped."""
        ...

    @property
    def cache_folders(self) -> list[Path]:
        """Folders of the cache that the step reads."""
        ...

    def prepare(self, batch: Batch, rng: Rng) -> Any:
        """Do what needs neither the student nor the target network. It may run one micro-batch ahead."""
        ...

    def evaluate_target(self, batch: Batch, state: Any, rng: Rng) -> Any:
        """Do what needs the target network and not the student, once the previous optimizer step is done."""
        ...

    def take(self, step: int, micro_batches: Iterable[Prepared], run: Run) -> StepReport:
        """Take an optimizer step.

        Args:
            step: Optimizer steps done before.
            micro_batches: The step's own, as many as are accumulated.
            run: Runs the student's work.
        """
        ...

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the named groups of tensors that a checkpoint holds."""
        ...

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the groups of a checkpoint back. Raises RunError if they belong to other parameters."""
        ...

    def is_finite(self) -> bool:
        """Return whether all trained weights are finite. All processes call it."""
        ...


@dataclass(kw_only=True)
class ConsistencyStep:
    """The step of the consistency family: a teacher, a target network and one optimizer."""

    objective: Objective
    student: Student
    online: Any
    "the student's trainable module, wrapped for the processes it runs in"
    optimizer: Any
    optim: OptimConfig
    sharing: Replicas
    schedule: NoiseSchedule
    teacher: TeacherNetwork
    student_network: Network
    target_network: Network
    phase: Phase = no_phase
    "times a phase of the step by its name"
    teacher_outputs: TeacherOutputCache | None = None
    "outputs that were computed before the run, if `data.teacher_cache_samples` asks for them"
    may_run_ahead: ClassVar[bool] = True

    @classmethod
    def build(cls, parts: StepParts) -> Self:
        """Build the step, with its optimizer."""
        student = parts.student
        online, optimizer = parts.trained(student.online, student.trainable.values(), parts.optim.learning_rate)
        return cls(
            objective=parts.objective,
            student=student,
            online=online,
            optimizer=optimizer,
            optim=parts.optim,
            sharing=parts.sharing,
            schedule=parts.schedule,
            teacher=parts.teacher,
            student_network=parts.network(online),
            target_network=parts.network(student.target),
        )

    @staticmethod
    def rehearse(
        objective: Objective,
        student: Student,
        networks: StepNetworks,
        schedule: NoiseSchedule,
        batch: Batch,
        rng: Rng,
        before_backward: Rehearse,
    ) -> None:
        """Run a micro-batch without an optimizer, as its memory is estimated.

        Args:
            objective: The method.
            student: Holds the parameters.
            networks: The networks, on the meta device.
            schedule: The teacher's schedule.
            batch: The micro-batch.
            rng: Its draws.
            before_backward: Called with the parameters that get gradients.
        """
        before_backward(student.trainable.values())
        with torch.no_grad():
            state = objective.teacher_step(networks.teacher, schedule, batch, rng)
            # As in a training step: before the student, whose activations are then not held yet.
            target = networks.target(state.z_s, state.s, batch.cond, state.w)
        objective.loss(networks.student, lambda *_: target, schedule, batch, state).mean().backward()

    @property
    def null(self) -> Conditioning:
        """The empty prompt, B = 1."""
        return self.teacher.null

    @property
    def cache_folders(self) -> list[Path]:
        """The folder of the teacher's outputs, if they are cached."""
        return [self.teacher_outputs.folder] if self.teacher_outputs is not None else []

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Rng) -> State:
        """Run the objective's teacher step, on cached outputs where there are any."""
        teacher = self.teacher
        with self.phase("teacher"):
            if self.teacher_outputs is not None:
                teacher = self.teacher_outputs.teacher(rng, self.schedule, self.null)
            return self.objective.teacher_step(teacher, self.schedule, batch, rng)

    @torch.no_grad()
    def evaluate_target(self, batch: Batch, state: State, rng: Rng) -> X0Eps:
        """Evaluate the target network where the state says: at (z_s, s, w)."""
        self._seed_dropout(rng)
        with self.phase("target"):
            return self.target_network(state.z_s, state.s, batch.cond, state.w)

    def take(self, step: int, micro_batches: Iterable[Prepared], run: Run) -> StepReport:
        """Add up the gradients of all micro-batches, and update the student."""
        losses, noise_levels = [], []
        for number, (rng, batch, state, target) in enumerate(micro_batches, 1):
            is_last = number == self.optim.gradient_accumulation_steps
            losses.append(
                run(lambda: self.forward_backward(batch, state, target, rng, is_last=is_last))  # noqa: B023
            )
            noise_levels.append(noise_level_fraction(self.schedule, state.t))
        return StepReport(losses, noise_levels, run(lambda: self.update(step)), {})

    def forward_backward(
        self, batch: Batch, state: State, target: Callable[[], X0Eps], rng: Rng, *, is_last: bool
    ) -> Tensor:
        """Evaluate the student after the target: of two adapters in one network, the last one chosen gets the gradients."""

        def evaluated(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            if z is not state.z_s or t is not state.s:
                raise RunError("the objective's loss asks the target network elsewhere than its state says")
            return target()

        def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            self._seed_dropout(rng)
            return self.student_network(z, t, c, w)

        with self.sharing.accumulating(self.online, is_last=is_last):
            with self.phase("forward"):
                losses = self.objective.loss(student, evaluated, self.schedule, batch, state)
            with self.phase("backward"):
                self.sharing.backward(losses.mean() / self.optim.gradient_accumulation_steps)
        return losses.detach()

    def update(self, step: int) -> Tensor:
        """Clip the gradients, take AdamW's step and let the target follow."""
        with self.phase("optimizer"):
            norm = update_parameters(self.sharing, self.optimizer, self.student.trainable, self.optim, step)
            self.student.follow(self.objective.ema_decay_at(step))
        return norm

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return student, target and optimizer."""
        student = self.student
        return {
            "student": student.trainable,
            "target": student.averaged,
            "optimizer": optimizer_tensors(self.optimizer),
        }

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy student, target and optimizer back."""
        copy_into(self.student.trainable, groups["student"])
        copy_into(self.student.averaged, groups["target"])
        self.student.refresh()
        restore_optimizer(self.optimizer, groups["optimizer"])

    def is_finite(self) -> bool:
        """Return whether the student's weights are finite."""
        return self.sharing.all_finite(self.student.trainable)

    def _seed_dropout(self, rng: Rng) -> None:
        if self.student.has_dropout:
            seed_dropout(rng)


def update_parameters(
    sharing: Replicas, optimizer: Any, parameters: Mapping[str, Tensor], optim: OptimConfig, step: int
) -> Tensor:
    """Clip the gradients, and take the optimizer's step; returns the gradient norm before clipping.

    Args:
        sharing: How the processes share the parameters.
        optimizer: The optimizer of the parameters.
        parameters: What is trained.
        optim: The [optim] section, with the learning rate of these parameters.
        step: Optimizer steps done before.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, optim)
    # An infinite limit clips nothing and still measures.
    norm = sharing.clip(parameters, optim.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's group back. Raises RunError if it belongs to other parameters."""
    if parameters.keys() != saved.keys():
        raise RunError("the checkpoint's parameters are not this student's; it was written by another version")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
