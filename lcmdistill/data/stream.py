"""Samples without a cache: each process reads parts of the sources that no other reads, and encodes them while it trains."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.chunks import (
    PIXELS_PER_BATCH,
    SAMPLE,
    check_finite,
    conditions_of_prompts,
    encode_latents,
    joined,
    latent_shape,
)
from lcmdistill.data.dataset import Read
from lcmdistill.data.sampler import epoch_order
from lcmdistill.data.sources.base import Member, Source
from lcmdistill.data.survey import GIVE_UP_AFTER, SourceReport, no_usable_samples_error
from lcmdistill.data.transforms import Rejected, Sample, check_sample
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.errors import RunError, UsageError

logger = logging.getLogger(__name__)

DECODERS = 4
"threads of a process that open and crop images"

WAITS = (1.0, 5.0, 15.0)
"seconds to wait before a part that could not be read is read on"

Placed = tuple[int, Sample]
"a sample, and the number that decides its crop and its random conditioning"


class Position(NamedTuple):
    """Where a process reads on.

    Attributes:
        epoch: The pass over all parts.
        place: The part's place in the order of that epoch.
        member: The next member of the part.
    """

    epoch: int
    place: int
    member: int = 0


def check_stream(config: DataConfig, sources: Sequence[Source]) -> None:
    """Raise UsageError for settings and sources that need the cache."""
    if config.cache == "on":
        return
    needs = {
        "data.trajectory": config.trajectory > 0,
        "data.teacher_cache_samples": config.teacher_cache_samples > 0,
        "data.buckets": config.buckets is not None,
        "data.max_samples": config.max_samples is not None,
    }
    if chosen := [name for name, is_set in needs.items() if is_set]:
        raise UsageError(f"{chosen[0]} needs the cache, and data.cache is off; remove one of the two")
    for source in sources:
        if source.is_generated and not source.prompts_only:
            raise UsageError(
                f"--data {source.label} has the teacher generate each image once, for the cache, and data.cache is off; remove "
                "data.cache, or pass images"
            )


class SampleStream:
    """The samples of one process, in an order that depends on the seed and the number of processes only.

    An epoch visits all parts of all sources once, in an order of its own, and process r of N reads the parts at the places r,
    r + N, ... With fewer parts than processes, each reads all parts and takes every N-th member.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: DataConfig,
        seed: int,
        rejects: Callable[[str], str | None],
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Set up the stream; nothing is read.

        Args:
            sources: The run's sources.
            config: Filters, resolution, crop and flip.
            seed: The run's seed.
            rejects: The teacher's check of a caption.
            rank: The process.
            world: The number of processes.
        """
        self.sources = tuple(sources)
        self._config, self._seed, self._rejects, self._rank, self._world = config, seed, rejects, rank, world
        self._parts = [(number, part) for number, source in enumerate(sources) for part in range(source.num_parts)]
        self._is_divided = len(self._parts) >= world
        self._kept: Counter[int] = Counter()
        self._dropped: list[Counter[str]] = [Counter() for _ in sources]
        self._kept_in = [0 for _ in sources]
        "per source: the epoch of the last sample that was kept"
        self._lost: set[int] = set()
        "the sources whose loss was reported"
        self.start = Position(0, rank if self._is_divided else 0)
        "where `samples` begins"

    def resume(self, positions: Sequence[Position]) -> None:
        """Begin where the processes of an earlier command stopped.

        With another number of processes, all begin behind the parts that were being read, the rest of which is left out.
        """
        if len(positions) == self._world:
            self.start = positions[self._rank]
            return
        epoch, last, _ = max(positions)
        self.start = Position(epoch, last + 1 + (self._rank if self._is_divided else 0))

    def samples(self) -> Iterator[tuple[Placed, Position]]:
        """Yield the samples without an end, each with the position after it.

        Raises:
            UsageError: If none can be used.
            RunError: If a part cannot be read, or no sample can be used any more.
        """
        waiting: deque[tuple[int, int, Position, Future[Sample | Rejected]]] = deque()
        # One OpenMP thread each, as for `read_ahead`.
        with ThreadPoolExecutor(DECODERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for number, member, place, after in self._members():
                decided = pool.submit(check_sample, member, self._config, self._seed, place, self._rejects)
                waiting.append((number, place, after, decided))
                if len(waiting) > 2 * DECODERS:
                    number, place, after, decided = waiting.popleft()
                    outcome = decided.result()
                    if isinstance(outcome, Sample):
                        self._kept[number] += 1
                        self._kept_in[number] = after.epoch
                        yield (place, outcome), after
                    else:
                        self._drop(number, outcome.reason, after.epoch)

    def batches(self, size: int) -> Iterator[tuple[list[Placed], Position]]:
        """Yield lists of `size` samples, each with the position after it."""
        samples = self.samples()
        while True:
            batch = list(islice(samples, size))
            yield [sample for sample, _ in batch], batch[-1][1]

    def reports(self) -> list[SourceReport]:
        """Return what became of the members of each source that this process read."""
        return [
            SourceReport(self._kept[number], tuple(dropped.most_common()), complete=False)
            for number, dropped in enumerate(self._dropped)
        ]

    def _members(self) -> Iterator[tuple[int, Member, int, Position]]:
        """Yield (source, member, the number that decides its crop, position after it)."""
        first, stride = (self._rank, self._world) if self._is_divided else (0, 1)
        (epoch, begin, start), has_members = self.start, False
        while True:
            order = epoch_order(len(self._parts), self._seed, epoch, "parts")
            for place in range(begin, len(self._parts), stride):
                at = int(order[place])
                number, part = self._parts[at]
                for i, member in enumerate(_patiently(self.sources[number], part, start), start=start):
                    has_members = True
                    if self._is_divided or i % self._world == self._rank:
                        yield number, member, derive_seed(epoch, "member", at, i), Position(epoch, place, i + 1)
                start = 0
            if not has_members and epoch > self.start.epoch:
                raise self._none_usable(0)
            epoch, begin = epoch + 1, first

    def _drop(self, number: int, reason: str, epoch: int) -> None:
        self._dropped[number][reason] += 1
        label = self.sources[number].label
        lost = f"--data {label} has lost its samples: a whole pass had no usable one (last reason: {reason})"
        if self._kept and epoch > max(self._kept_in) + 1:
            raise RunError(f"{lost}; restore the files, and run the same command again")
        if self._kept[number] and epoch > self._kept_in[number] + 1 and number not in self._lost:
            self._lost.add(number)
            logger.warning(f"{lost}; training continues with the other sources")
        if not self._kept and self._dropped[number].total() >= GIVE_UP_AFTER:
            raise self._none_usable(number)

    def _none_usable(self, number: int) -> UsageError:
        return no_usable_samples_error(self.sources[number], self.reports()[number])


def _patiently(source: Source, part: int, start: int) -> Iterator[Member]:
    """Yield the members of a part, and read it on where that fails. A try that brings something resets the patience."""
    waits = iter(WAITS)
    while True:
        try:
            for member in source.members_of_part(part, start):
                start, waits = start + 1, iter(WAITS)
                yield member
            return
        except RunError as error:
            if (wait := next(waits, None)) is None:
                raise
            logger.warning(f"{error}; trying again in {wait:g} s")
            time.sleep(wait)


def encode(samples: Sequence[Placed], teacher: Teacher, config: DataConfig, seed: int, *, prompts_only: bool) -> Read:
    """Return samples as a cache would hold them, rounded as there, on the teacher's device.

    Args:
        samples: The samples of a micro-batch.
        teacher: Encodes images and captions.
        config: The resolution.
        seed: The run's seed.
        prompts_only: Whether there are no images.
    """
    prompts = teacher.encode_prompts([sample.caption for _, sample in samples])
    if prompts_only:
        blank = torch.zeros(len(samples), *latent_shape(teacher, config))
        tensors = {"mean": blank, "std": blank, **conditions_of_prompts(samples, teacher)}
    else:
        few = max(1, PIXELS_PER_BATCH // config.resolution**2)
        how: Any = {"teacher": teacher, "config": config, "seed": seed, "dtype": torch.float32}
        batches = (samples[i : i + few] for i in range(0, len(samples), few))
        tensors = joined([encode_latents(batch, lambda: None, **how) for batch in batches])
    own = {name.removeprefix(SAMPLE): value for name, value in tensors.items() if name.startswith(SAMPLE)}
    cond = Conditioning({**_rounded(prompts.values), **own})
    latents = _rounded({name: tensors[name] for name in ("mean", "std")})
    check_finite(latents["mean"])
    return Read(latents["mean"], latents["std"], cond)


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in fp32, their floats rounded to fp16 as a cache rounds them."""
    return {name: value.half().float() if value.is_floating_point() else value for name, value in tensors.items()}
