"""A small network's micro-batch on a CPU, as work that goes side by side: a thread with a share of the cores for each.

The operations of such a network are so short that the cores, sharing each of them, mostly wait for one another. The work is
divided by network, `Ahead`, or where samples are many by sample, `Parts`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lcmdistill.batch import Batch, Conditioning, Models, Network, Rng
from lcmdistill.objectives import Objective, forwards, only
from lcmdistill.prediction import X0Eps

SMALL = 2**25
"parameters of a network whose operations one core does as well, and of whose gradients each part may have its own"
LEAST = 16
"samples of a part, below which an operation's start costs too much beside its arithmetic"


Answered = Callable[[], list[X0Eps]]
"waits for what a network answers"


class Ahead:
    """Two threads: one asks the frozen networks while the other takes the student forward and, if there is a teacher, back.

    The target of a micro-batch is asked when the step before is done, and its teacher one micro-batch earlier: in an
    LCM's step each thread has three forwards' worth. Where no teacher is asked, the way back has all cores to itself.
    The networks must draw no dropout.
    """

    def __init__(self, *, asks: bool) -> None:
        cores = max(1, torch.get_num_threads() // 2)
        self.asks = asks
        self.frozen, self._student = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores,)) for _ in range(2)
        )

    def asked(
        self, objective: Objective, micro_batches: Iterable[tuple[Rng, Batch, Models]]
    ) -> Iterator[tuple[Rng, Batch, Models]]:
        """The same micro-batches in their order, their networks being asked already, or asked by now.

        The next one is to be taken only when the optimiser has stepped and the target has followed.
        """

        def ask(thread: ThreadPoolExecutor, role: str, rng: Rng, batch: Batch, some: Models) -> Answered:
            return thread.submit(answers, objective, some, role, rng, batch).result

        def begun() -> Iterator[tuple[Rng, Batch, Models, Callable[[], Network]]]:
            for rng, batch, models in micro_batches:
                if self.asks:
                    answered = ask(self.frozen, "teacher", rng, batch, only(models, "teacher"))
                    yield rng, batch, models, partial(repeating, answered)
                else:
                    yield rng, batch, models, partial(getattr, models, "teacher")

        given = begun()
        now = next(given, None)
        while now is not None:
            rng, batch, models, teacher = now
            target = ask(self.frozen, "target", rng, batch, replace(only(models, "target"), teacher=teacher()))
            student = ask(self._student, "student", rng, batch, only(models, "student"))
            told = replace(models, teacher=teacher(), target=repeating(target), student=repeating(student))
            now = next(given, None)
            yield rng, batch, told

    def student(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the rest of the student's work: the loss, and the way back."""
        return self._student.submit(work).result() if self.asks else work()


def answers(objective: Objective, models: Models, role: str, rng: Rng, batch: Batch) -> list[X0Eps]:
    """What one of the networks answers in an objective's loss. models: what leads to its question, and itself."""
    heard: list[X0Eps] = []
    network: Network = getattr(models, role)

    def heeded(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        heard.append(network(z, t, c, w))
        return heard[-1]

    objective.loss(replace(models, **{role: heeded}), batch, rng)
    return heard


def repeating(answered: Answered) -> Network:
    """A network that gives what was answered, in its order; waits for it when it is first asked."""

    def each() -> Iterator[X0Eps]:
        yield from answered()

    told = each()
    return lambda z, t, c, w: next(told)


class Parts:
    """A thread for each part of a micro-batch. What they compute with must not change in between, and draw no dropout."""

    def __init__(self, count: int) -> None:
        self.count = count
        cores = torch.get_num_threads() // count
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(cores,))

    def add_gradients(
        self, losses: Callable[[int, int], Tensor], size: int, weight: float, parameters: Sequence[Tensor]
    ) -> Tensor:
        """Add the gradients of weight x the sum of all losses to the parameters' own; returns the losses, (size,).

        losses: (n,), of the samples from one place to another.
        """

        def part(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
            each = losses(start, stop)
            return each.detach(), list(torch.autograd.grad(weight * each.sum(), parameters, materialize_grads=True))

        cuts = [size * i // self.count for i in range(self.count + 1)]
        found = list(self._pool.map(part, cuts[:-1], cuts[1:]))
        # In their order, whoever was first: a sum in another one is rounded otherwise.
        sums = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for _, gradients in found:
            sums = list(torch._foreach_add(sums, gradients)) if sums else gradients
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        return torch.cat([each for each, _ in found])


def division(
    objective: Objective, models: Models, parameters: int, batch_size: int, *, asks: bool
) -> Ahead | Parts | None:
    """How this CPU best divides the micro-batches of a network; None leaves them whole.

    parameters: of what is trained; asks: whether the teacher is asked at every step.
    """
    threads = torch.get_num_threads()
    if threads == 1 or parameters >= SMALL:
        return None
    asks = asks and forwards(objective, models.schedule).get("teacher", 0) > 0
    count = min(threads, batch_size // LEAST)
    # By network two threads have as much to do as each other where a teacher is asked; else the student's way back is shared.
    return Parts(count) if count > (2 if asks else 1) else Ahead(asks=asks)
