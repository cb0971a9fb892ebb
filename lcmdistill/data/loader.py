"""Micro-batches of prepared samples: read ahead of the computation, and completed by a step's own draws."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
from torch import Tensor

from lcmdistill.data.dataset import LatentDataset
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, Conditioning
from lcmdistill.utils.device import copy_to_device

Read = tuple[Tensor, Tensor, Conditioning]
"(mean, std, conditioning), as LatentDataset reads them"


def read_ahead(dataset: LatentDataset, wanted: Iterable[Sequence[int]]) -> Iterator[Read]:
    """What `dataset.read` gives of each of the wanted lists of indices; a thread reads the next while one is computed."""
    # One core: with helpers of its own the threads would be more than the cores, and OpenMP puts all of them to sleep at once.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        reading = None
        for indices in chain(wanted, [None]):
            done, reading = reading, None if indices is None else thread.submit(dataset.read, list(indices))
            if done is not None:
                yield done.result()


def batch_of(read: Read, rng: Rng, null: Conditioning, caption_drop: float) -> Batch:
    """Latents drawn from their posteriors, on the rng's device; of a share of them the caption is the empty one.

    null: the empty prompt, B = 1; caption_drop: 0 to 1.
    """
    mean, std, cond = read
    mean, std = copy_to_device(mean, rng.device), copy_to_device(std, rng.device)
    cond = Conditioning({name: copy_to_device(value, rng.device) for name, value in cond.values.items()})
    latents = mean + std * rng.normal("posterior", mean.shape[1:])
    if caption_drop:
        dropped = rng.uniform("caption-drop") < caption_drop
        cond = cond.replace_where(dropped, null.expand(len(mean)))
    return Batch(latents, cond)
