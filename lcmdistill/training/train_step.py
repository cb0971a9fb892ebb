"""What a method does in one optimizer step. The Trainer knows no method: it is given a TrainStep.

Shapes: B micro-batch, C h w latents.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig
from lcmdistill.data.teacher_cache import TeacherOutputCache
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng, seed_dropout
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, TeacherNetwork
from lcmdistill.objectives.base import Objective, State
from lcmdistill.objectives.common import noise_level_fraction
from lcmdistill.students.student import Student
from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.training.distributed import Accelerator
from lcmdistill.training.optimizer import learning_rate_at
from lcmdistill.utils.errors import RunError


class TrainStep(Protocol):
    """One method's training step. It owns its networks, its optimizers and the tensors that a checkpoint holds.

    The Trainer calls `prepare` and `evaluate_target` for each micro-batch, possibly in another thread, then
    `forward_backward`, and `update` once per optimizer step.
    """

    student: Student
    "what is sampled, validated and exported"

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

    def forward_backward(
        self, batch: Batch, state: Any, target: Callable[[], Any], rng: Rng, *, is_last: bool
    ) -> Tensor:
        """Add the micro-batch's gradients, and return the loss of each sample, (B,) fp32.

        Args:
            batch: The micro-batch.
            state: What `prepare` returned for it.
            target: Waits for what `evaluate_target` returned for it.
            rng: The micro-batch's draws.
            is_last: Whether it is the last one of the optimizer step, after which gradients are shared.
        """
        ...

    def update(self, step: int) -> Tensor:
        """Clip, step the optimizers and move the averages; returns the gradient norm before clipping."""
        ...

    def noise_level(self, state: Any) -> Tensor:
        """Return the noise level of each sample as a fraction of the schedule, (B,) fp32 from 0 (clean) to 1."""
        ...

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the named groups of tensors that a checkpoint holds."""
        ...

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the groups of a checkpoint back. Raises RunError if they belong to other parameters."""
        ...

    def is_finite(self) -> bool:
        """Return whether all trained weights are finite."""
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
    accelerator: Accelerator
    schedule: NoiseSchedule
    teacher: TeacherNetwork
    student_network: Network
    target_network: Network
    phase: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext()
    "times a phase of the step by its name"
    teacher_outputs: TeacherOutputCache | None = None
    "outputs that were computed before the run, if `data.teacher_cache_samples` asks for them"

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

        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.online):
            with self.phase("forward"):
                losses = self.objective.loss(student, evaluated, self.schedule, batch, state)
            with self.phase("backward"):
                self.accelerator.backward(losses.mean() / self.optim.gradient_accumulation_steps)
        return losses.detach()

    def update(self, step: int) -> Tensor:
        """Clip the gradients, take AdamW's step and let the target follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.optim)
        parameters = list(self.student.trainable.values())
        with self.phase("optimizer"):
            # An infinite limit clips nothing and still measures.
            norm = self.accelerator.clip_grad_norm_(parameters, self.optim.max_grad_norm or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.student.follow(self.objective.ema_decay_at(step))
        return torch.as_tensor(norm)

    def noise_level(self, state: State) -> Tensor:
        """Return where each t lies in the schedule."""
        return noise_level_fraction(self.schedule, state.t)

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
        _copy_into(self.student.trainable, groups["student"])
        _copy_into(self.student.averaged, groups["target"])
        self.student.refresh()
        restore_optimizer(self.optimizer, groups["optimizer"])

    def is_finite(self) -> bool:
        """Return whether the student's weights are finite."""
        return all(bool(value.isfinite().all()) for value in self.student.trainable.values())

    def _seed_dropout(self, rng: Rng) -> None:
        if self.student.has_dropout:
            seed_dropout(rng)


@torch.no_grad()
def _copy_into(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if parameters.keys() != saved.keys():
        raise RunError("the checkpoint's parameters are not this student's; it was written by another version")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
