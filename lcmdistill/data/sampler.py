"""The order of the samples: a function of (seed, step, place), so that there is nothing to save."""

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from lcmdistill.diffusion.random import derive_seed

Shape = tuple[int, int]
"height and width of latents"


def epoch_order(size: int, seed: int, epoch: int, *of: str) -> Tensor:
    """Return the order in which an epoch visits `size` samples, each exactly once: (size,) int64.

    of: names of the subset that is ordered, if it is not all samples.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch, *of)))


class SampleOrder:
    """The order of a run. All samples of a step have one shape, however the step is split into micro-batches and processes.

    The samples of a shape have epochs of their own, which follow each other without a gap and visit each sample once. Steps
    are assigned to shapes in rounds: with global batch G, round r has floor((r + 1) n / G) - floor(r n / G) steps for a shape
    of n samples, in an order drawn from the seed. Each shape so gets its share, and a remainder is carried to the next round.
    """

    def __init__(self, size: int, seed: int, global_batch: int, shapes: Sequence[Shape] | None = None) -> None:
        """Set up the order.

        Args:
            size: Number of samples.
            seed: The run's seed.
            global_batch: Samples per step, over all micro-batches and processes.
            shapes: The shape of each sample; None if all have the same.
        """
        self._seed, self._global_batch, self._size = seed, global_batch, size
        members: dict[Shape, list[int]] = {}
        for index, shape in enumerate(shapes or [(0, 0)] * size):
            members.setdefault(shape, []).append(index)
        self._members = [members[shape] for shape in sorted(members)]
        names = [f"{height}x{width}" for height, width in sorted(members)]
        self._names = [(name,) if len(names) > 1 else () for name in names]
        self._orders: dict[tuple[int, int], Tensor] = {}
        self._round, self._turns = -1, [(0, 0)]

    def indices(self, step: int, places: Sequence[int]) -> list[int]:
        """Return the samples at `places` of the global batch of `step`."""
        group, before = self._turn(step) if len(self._members) > 1 else (0, step)
        return [self._index(group, before * self._global_batch + place) for place in places]

    def _index(self, group: int, position: int) -> int:
        members = self._members[group]
        epoch, offset = divmod(position, len(members))
        if (group, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != group or k[1] >= epoch - 1}
            self._orders[group, epoch] = epoch_order(len(members), self._seed, epoch, *self._names[group])
        return members[int(self._orders[group, epoch][offset])]

    def _turn(self, step: int) -> tuple[int, int]:
        """Return the group of a step, and how many earlier steps were that group's."""
        first = step * self._global_batch // self._size  # rounds have no more steps than their share
        this = next(r for r in count(first) if self._steps_before(r + 1) > step)
        if this != self._round:
            before, after = self._each_before(this), self._each_before(this + 1)
            turns = [(g, n) for g, (a, b) in enumerate(zip(before, after, strict=True)) for n in range(a, b)]
            order = epoch_order(len(turns), self._seed, this, "turns").tolist()
            groups, counts = [turns[i][0] for i in order], list(before)
            self._turns = []
            for group in groups:
                self._turns.append((group, counts[group]))
                counts[group] += 1
            self._round = this
        return self._turns[step - self._steps_before(this)]

    def _each_before(self, r: int) -> list[int]:
        """Return the number of steps of each group before round r."""
        return [r * len(members) // self._global_batch for members in self._members]

    def _steps_before(self, r: int) -> int:
        return sum(self._each_before(r))
