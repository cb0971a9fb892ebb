"""A small network's micro-batch on a CPU, in parts that are computed side by side: a thread with a share of the cores for each.

The operations of such a network are so short that the cores, sharing each of them, mostly wait for one another.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

SMALL = 2**25
"parameters of a network whose operations one core does as well, and of whose gradients each part may have its own"
LEAST = 8
"samples of a part, below which an operation's start costs more than its arithmetic"


def parts_for(parameters: int, batch_size: int) -> int:
    """How many parts a micro-batch is best cut into on this CPU: 1 leaves it whole.

    parameters: of what is trained.
    """
    return max(1, min(torch.get_num_threads(), batch_size // LEAST)) if parameters < SMALL else 1


class SideBySide:
    """Threads for the parts of a micro-batch. What they compute with must not change in between, and draw no dropout."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        cores = torch.get_num_threads() // parts
        self._pool = ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(cores,))

    def add_gradients(
        self, losses: Callable[[int, int], Tensor], size: int, weight: float, parameters: Sequence[Tensor]
    ) -> Tensor:
        """Add the gradients of weight x the sum of all losses to the parameters' own; returns the losses, (size,).

        losses: (n,), of the samples from one place to another.
        """

        def part(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
            each = losses(start, stop)
            return each.detach(), list(torch.autograd.grad(weight * each.sum(), parameters, materialize_grads=True))

        cuts = [size * i // self.parts for i in range(self.parts + 1)]
        found = list(self._pool.map(part, cuts[:-1], cuts[1:]))
        # In their order, whoever was first: a sum in another one is rounded otherwise.
        sums = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for _, gradients in found:
            sums = list(torch._foreach_add(sums, gradients)) if sums else gradients
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        return torch.cat([each for each, _ in found])
