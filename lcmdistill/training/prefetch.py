"""The order of work inside an optimizer step: one thing after another, or the frozen networks ahead in a thread of their own.

Operations of a small network on a CPU are so short that cores which share each of them mostly wait for one another. Two
threads with half of the cores each then do the same work in less time.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, Network
from lcmdistill.training.train_step import Prepared, TrainStep

SMALL = 2**25
"trainable parameters of a network whose operations one core does as well as several"


class InOrder:
    """Teacher, target and student one after the other: on a GPU, for large networks and for adapters.

    Adapters of one network are switched on and off in it, so that no two threads may evaluate it at the same time.
    """

    def prepared(self, step: TrainStep, micro_batches: Iterable[tuple[Rng, Batch]]) -> Iterator[Prepared]:
        """Yield the micro-batches in their order. The next one is requested only after an optimizer step, if one is due."""
        for rng, batch in micro_batches:
            state = step.prepare(batch, rng)
            target = step.evaluate_target(batch, state, rng)
            yield Prepared(rng, batch, state, lambda target=target: target)

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the student's work."""
        return work()

    def student_network(self, network: Network) -> Network:
        """Return the student's network as the step is to call it."""
        return network


class Prefetcher(InOrder):
    """The teacher's part of the next micro-batch runs ahead in a thread, behind the target's part of the current one.

    With a teacher, that thread has three forwards per LCM step and the student's thread as much (a backward pass takes
    two); without one, only the two forwards run at the same time, and the backward pass has all cores. Networks must have
    no dropout: it draws from one generator.
    """

    def __init__(self, *, has_teacher: bool) -> None:
        cores = max(1, torch.get_num_threads() // 2)
        self.has_teacher = has_teacher
        self.frozen, self._student = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores,)) for _ in range(2)
        )

    def prepared(self, step: TrainStep, micro_batches: Iterable[tuple[Rng, Batch]]) -> Iterator[Prepared]:
        """Yield the micro-batches in their order, one ahead of the caller."""
        following = ((rng, batch, self.frozen.submit(step.prepare, batch, rng)) for rng, batch in micro_batches)
        current = next(following, None)
        while current is not None:
            rng, batch, preparing = current
            state = preparing.result()
            target = self.frozen.submit(step.evaluate_target, batch, state, rng)
            current = next(following, None)
            yield Prepared(rng, batch, state, target.result)

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the student's work in its thread, where a teacher keeps the other half of the cores busy."""
        return self._student.submit(work).result() if self.has_teacher else work()

    def student_network(self, network: Network) -> Network:
        """Return the network; without a teacher it is evaluated in the student's thread, next to the target network."""
        if self.has_teacher:
            return network
        return lambda z, t, c, w: self._student.submit(network, z, t, c, w).result()


def order_of_work(parameters: int, *, device: torch.device, has_teacher: bool, may_share: bool) -> InOrder:
    """Choose how a process orders its work.

    Args:
        parameters: The number of trainable parameters.
        device: The device that the networks are on.
        has_teacher: Whether a teacher is evaluated at every step.
        may_share: Whether frozen networks and student may be evaluated at the same time.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1 or parameters >= SMALL or not may_share:
        return InOrder()
    return Prefetcher(has_teacher=has_teacher)
