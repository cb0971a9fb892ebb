"""Micro-batches of prepared samples: read ahead of the computation, then completed by the random draws of a step."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import torch

from lcmdistill.data.dataset import Read
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, Conditioning
from lcmdistill.utils.device import copy_to_device

T = TypeVar("T")


def read_ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the result of each call. A thread makes the next one while the caller computes."""
    # One OpenMP thread: with more, there are more threads than cores, and OpenMP suspends all of them at once.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        reading = None
        for read in chain(reads, [None]):
            done, reading = reading, None if read is None else thread.submit(read)
            if done is not None:
                yield done.result()


def batch_of(read: Read, rng: Rng, null: Conditioning, caption_drop: float) -> Batch:
    """Return a batch on the rng's device: latents drawn from their posteriors, some with the empty prompt.

    Args:
        read: What `read_ahead` yields.
        rng: The draws of the micro-batch.
        null: The empty prompt, B = 1.
        caption_drop: The fraction of captions that the empty prompt replaces, 0 to 1.
    """
    cond = read.cond
    mean, std = copy_to_device(read.mean, rng.device), copy_to_device(read.std, rng.device)
    cond = Conditioning({name: copy_to_device(value, rng.device) for name, value in cond.values.items()})
    latents = mean + std * rng.normal("posterior", mean.shape[1:])
    if caption_drop:
        dropped = rng.uniform("caption-drop") < caption_drop
        cond = cond.replace_where(dropped, null.expand(len(mean)))
    return Batch(latents, cond, None if read.trajectory is None else read.trajectory.to(rng.device))
