"""A small network's micro-batch on a CPU, as work that goes side by side: two threads, each with half of the cores.

The operations of such a network are so short that the cores, sharing each of them, mostly wait for one another.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, Conditioning, Network, Networks
from lcmdistill.objectives.base import Objective, forwards, only

SMALL = 2**25
"parameters of a network whose operations one core does as well"

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
        self, objective: Objective, micro_batches: Iterable[tuple[Rng, Batch, Networks]]
    ) -> Iterator[tuple[Rng, Batch, Networks]]:
        """The same micro-batches in their order, their networks being asked already, or asked by now.

        The next one is to be taken only when the optimiser has stepped and the target has followed.
        """

        def ask(thread: ThreadPoolExecutor, role: str, rng: Rng, batch: Batch, some: Networks) -> Answered:
            return thread.submit(answers, objective, some, role, rng, batch).result

        def begun() -> Iterator[tuple[Rng, Batch, Networks, Callable[[], Network]]]:
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
        """Do the rest of the student's work: the loss, the way back, the optimiser's step."""
        return self._student.submit(work).result() if self.asks else work()


def answers(objective: Objective, models: Networks, role: str, rng: Rng, batch: Batch) -> list[X0Eps]:
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


def division(objective: Objective, models: Networks, parameters: int, *, asks: bool) -> Ahead | None:
    """How this CPU best divides the micro-batches of a network; None leaves them whole.

    parameters: of what is trained; asks: whether the teacher is asked at every step.
    """
    if torch.get_num_threads() == 1 or parameters >= SMALL:
        return None
    return Ahead(asks=asks and forwards(objective, models.schedule).get("teacher", 0) > 0)
