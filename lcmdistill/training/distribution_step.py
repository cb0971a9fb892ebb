"""The step of distribution matching: a teacher, a critic of the student's own outputs, and two optimizers.

Shapes: B micro-batch, C h w latents.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig
from lcmdistill.diffusion.random import Rng, seed_dropout
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, TeacherNetwork
from lcmdistill.objectives.base import DistributionMatching
from lcmdistill.students.student import Student
from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.training.sharding import Replicas
from lcmdistill.training.train_step import (
    Phase,
    Prepared,
    Rehearse,
    Run,
    StepNetworks,
    StepParts,
    StepReport,
    copy_into,
    no_phase,
    update_parameters,
)


class RolledOut(NamedTuple):
    """A micro-batch with the student's trajectories, from which all losses of the step start."""

    rng: Rng
    cond: Conditioning
    rollout: Any


@dataclass(kw_only=True)
class DistributionMatchingStep:
    """All micro-batches are rolled out, then the critic is updated on all of them, then the student.

    However many micro-batches a step has, its updates are those of one large batch.
    """

    objective: DistributionMatching
    student: Student
    online: Any
    "the student's module, wrapped for the processes it runs in"
    optimizer: Any
    critic_online: Any
    "the same for the critic"
    critic_optimizer: Any
    optim: OptimConfig
    sharing: Replicas
    schedule: NoiseSchedule
    teacher: TeacherNetwork
    student_network: Network
    "the trained network, whose gradients the processes share"
    critic_network: Network
    frozen_student: Network
    "the same network where no gradients are needed"
    frozen_critic: Network
    phase: Phase = no_phase
    "times a phase of the step by its name"
    may_run_ahead: ClassVar[bool] = False
    teacher_outputs: ClassVar[None] = None

    @classmethod
    def build(cls, parts: StepParts) -> Self:
        """Build the step, with its optimizers."""
        student, objective = parts.student, parts.objective
        online, optimizer = parts.trained(student.online, student.trainable.values(), parts.optim.learning_rate)
        critic, critic_optimizer = parts.trained(
            student.critic, student.critic_trainable.values(), objective.critic.learning_rate
        )
        return cls(
            objective=objective,
            student=student,
            online=online,
            optimizer=optimizer,
            critic_online=critic,
            critic_optimizer=critic_optimizer,
            optim=parts.optim,
            sharing=parts.sharing,
            schedule=parts.schedule,
            teacher=parts.teacher,
            student_network=parts.network(online),
            critic_network=parts.network(critic),
            frozen_student=parts.network(student.online),
            frozen_critic=parts.network(student.critic),
        )

    @staticmethod
    def rehearse(
        objective: DistributionMatching,
        student: Student,
        networks: StepNetworks,
        schedule: NoiseSchedule,
        batch: Batch,
        rng: Rng,
        before_backward: Rehearse,
    ) -> None:
        """Run a micro-batch without optimizers, as its memory is estimated. Arguments: as `ConsistencyStep.rehearse`."""
        assert networks.critic is not None
        with torch.no_grad():
            noise = rng.normal("noise", batch.latents.shape[1:])
            rollout = objective.rollout(networks.student, schedule, batch.cond, noise)
        before_backward(student.critic_trainable.values())
        objective.critic_loss(networks.critic, schedule, batch.cond, rollout, rng).mean().backward()
        for parameter in student.critic_trainable.values():
            parameter.grad = None
        before_backward(student.trainable.values())
        found = objective.student_loss(
            networks.student, networks.critic, networks.teacher, schedule, batch.cond, rollout, rng
        )
        student.select_online()
        found.loss.mean().backward()

    @property
    def null(self) -> Conditioning:
        """The empty prompt, B = 1."""
        return self.teacher.null

    @property
    def cache_folders(self) -> list[Path]:
        """Nothing is read from the cache during a step."""
        return []

    def prepare(self, batch: Batch, rng: Rng) -> None:
        """Do nothing: all networks are evaluated where the student leads."""

    def evaluate_target(self, batch: Batch, state: None, rng: Rng) -> None:
        """Do nothing: the average of the student is sampled only."""

    def take(self, step: int, micro_batches: Iterable[Prepared], run: Run) -> StepReport:
        """Roll out all micro-batches, update the critic, then the student, and let the average follow."""
        rolled_out = [self._roll_out(each) for each in micro_batches]
        of_critic = [self._update_critic(step, rolled_out, draw) for draw in range(self.objective.critic_steps)]
        losses, noise_levels, found = [], [], []
        for micro in rolled_out:
            loss, tau, numbers = self._student_backward(micro, is_last=micro is rolled_out[-1])
            losses.append(loss)
            noise_levels.append(tau)
            found.append(numbers)
        with self.phase("optimizer"):
            norm = update_parameters(self.sharing, self.optimizer, self.student.trainable, self.optim, step)
            self.student.follow(self.objective.ema_decay_at(step))
        numbers = {name: torch.cat([each[name] for each in found]).mean() for name in found[0]}
        critic_loss, critic_norm = (torch.stack(values).mean() for values in zip(*of_critic, strict=True))
        return StepReport(
            losses, noise_levels, norm, {"critic_loss": critic_loss, "critic_grad_norm": critic_norm, **numbers}
        )

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return student, target, critic and both optimizers."""
        return {
            "student": self.student.trainable,
            "target": self.student.averaged,
            "critic": self.student.critic_trainable,
            "optimizer": optimizer_tensors(self.optimizer),
            "critic_optimizer": optimizer_tensors(self.critic_optimizer),
        }

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy networks and optimizers back."""
        copy_into(self.student.trainable, groups["student"])
        copy_into(self.student.averaged, groups["target"])
        copy_into(self.student.critic_trainable, groups["critic"])
        self.student.refresh()
        restore_optimizer(self.optimizer, groups["optimizer"])
        restore_optimizer(self.critic_optimizer, groups["critic_optimizer"])

    def is_finite(self) -> bool:
        """Return whether the weights of student and critic are finite."""
        return all(self.sharing.all_finite(each) for each in (self.student.trainable, self.student.critic_trainable))

    @torch.no_grad()
    def _roll_out(self, micro: Prepared) -> RolledOut:
        rng, cond = micro.rng, micro.batch.cond
        noise = rng.normal("noise", micro.batch.latents.shape[1:])
        self._seed_dropout(rng)
        with self.phase("target"):
            return RolledOut(rng, cond, self.objective.rollout(self.frozen_student, self.schedule, cond, noise))

    def _update_critic(self, step: int, rolled_out: Sequence[RolledOut], draw: int) -> tuple[Tensor, Tensor]:
        """Update the critic on all micro-batches; returns the mean loss and the gradient norm before clipping."""
        losses = []
        for micro in rolled_out:
            with self.sharing.accumulating(self.critic_online, is_last=micro is rolled_out[-1]):
                with self.phase("forward"):
                    loss = self.objective.critic_loss(
                        self.critic_network, self.schedule, micro.cond, micro.rollout, micro.rng, draw
                    ).mean()
                self._backward(loss)
            losses.append(loss.detach())
        optim = replace(self.optim, learning_rate=self.objective.critic.learning_rate)
        with self.phase("optimizer"):
            norm = update_parameters(self.sharing, self.critic_optimizer, self.student.critic_trainable, optim, step)
        return torch.stack(losses).mean(), norm

    def _student_backward(self, micro: RolledOut, *, is_last: bool) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Add a micro-batch's gradients of the student."""
        self._seed_dropout(micro.rng)
        with self.sharing.accumulating(self.online, is_last=is_last):
            with self.phase("forward"):
                loss, tau, numbers = self.objective.student_loss(
                    self.student_network,
                    self.frozen_critic,
                    replace(self.teacher, network=self._timed_teacher),
                    self.schedule,
                    micro.cond,
                    micro.rollout,
                    micro.rng,
                )
            self.student.select_online()
            self._backward(loss.mean())
        return loss.detach(), tau, numbers

    def _timed_teacher(self, *inputs: Any) -> Any:
        with self.phase("teacher"):
            return self.teacher.network(*inputs)

    def _backward(self, loss: Tensor) -> None:
        with self.phase("backward"):
            self.sharing.backward(loss / self.optim.gradient_accumulation_steps)

    def _seed_dropout(self, rng: Rng) -> None:
        if self.student.has_dropout:
            seed_dropout(rng)
