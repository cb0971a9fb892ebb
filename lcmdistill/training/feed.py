"""What feeds a run: its micro-batches as samples and random draws, from the cache or from the sources themselves."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.dataset import LatentDataset, Read
from lcmdistill.data.loader import read_ahead
from lcmdistill.data.stream import Placed, Position, SampleStream, encode
from lcmdistill.diffusion.random import Rng
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.distributed import Accelerator, gather
from lcmdistill.training.micro_batches import places_of, sample_plan

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """Where a process's micro-batches come from."""

    def micro_batches(self, first_step: int) -> Iterator[tuple[Rng, Callable[[], Read]]]:
        """Yield the draws of each micro-batch, to the end of the run, and a function that returns its samples.

        The next one is read while the caller computes; what the function does is the caller's time.
        """
        ...

    def state(self, step: int) -> dict[str, Any]:
        """Return plain values for the checkpoint of a step that was just taken. All processes call it."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        ...

    def log_reports(self) -> None:
        """Log what became of the samples, where it is known only now."""
        ...


@dataclass(frozen=True)
class CachedFeed:
    """Prepared samples, in an order that does not depend on the number of processes."""

    config: RunConfig
    accelerator: Accelerator
    dataset: LatentDataset

    def micro_batches(self, first_step: int) -> Iterator[tuple[Rng, Callable[[], Read]]]:
        """See `Feed.micro_batches`."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        plans, requests = itertools.tee(sample_plan(self.config, self.dataset, rank, world, first_step, device))
        reads = read_ahead(partial(self.dataset.read, list(indices)) for _, indices in requests)
        for rng, _ in plans:
            read = next(reads)
            yield rng, lambda read=read: read

    def state(self, step: int) -> dict[str, Any]:
        """Return nothing: the order is a function of the step."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Feed.restore`."""

    def log_reports(self) -> None:
        """See `Feed.log_reports`."""


@dataclass
class StreamFeed:
    """Samples that are read and encoded while the run trains."""

    config: RunConfig
    accelerator: Accelerator
    teacher: Teacher
    stream: SampleStream
    _after: dict[int, Position] = field(default_factory=dict)
    "where the samples of the following step begin, by the number of steps taken"

    def micro_batches(self, first_step: int) -> Iterator[tuple[Rng, Callable[[], Read]]]:
        """See `Feed.micro_batches`."""
        optim, run, accelerator = self.config.optim, self.config.run, self.accelerator
        count = (optim.max_train_steps - first_step) * optim.gradient_accumulation_steps
        batches = self.stream.batches(optim.batch_size)
        reads = read_ahead(itertools.repeat(partial(next, batches), count))
        self._after = {first_step: self.stream.start}
        steps = range(first_step, optim.max_train_steps)
        for step, micro in itertools.product(steps, range(optim.gradient_accumulation_steps)):
            samples, position = next(reads)
            if micro == optim.gradient_accumulation_steps - 1:
                # A few steps are known at a time: the last micro-batch may be requested ahead of the step before.
                self._after = {k: v for k, v in self._after.items() if k >= step - 1} | {step + 1: position}
            places = places_of(optim, micro, accelerator.process_index, accelerator.num_processes)
            yield Rng(run.seed, step, places, accelerator.device), partial(self._encode, samples)

    @torch.no_grad()
    def _encode(self, samples: Sequence[Placed]) -> Read:
        only = self.config.objective.info.prompts_only
        return encode(samples, self.teacher, self.config.data, self.config.run.seed, prompts_only=only)

    def state(self, step: int) -> dict[str, Any]:
        """Return where each process reads on."""
        position = torch.tensor(self._after[step], device=self.accelerator.device)
        return {"positions": gather(position, self.accelerator).tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Feed.restore`."""
        positions = [Position(*each) for each in state["positions"]]
        if len(positions) != self.accelerator.num_processes and self.accelerator.is_main_process:
            logger.warning(
                f"the run was saved by {len(positions)} processes, and is read on by {self.accelerator.num_processes}: the "
                "rest of the shards that were being read is left out of this pass"
            )
        self.stream.resume(positions)

    def log_reports(self) -> None:
        """Log what became of the samples that the main process read."""
        if self.accelerator.is_main_process:
            for source, report in zip(self.stream.sources, self.stream.reports(), strict=True):
                logger.info(f"data {source.label}: {report}")
