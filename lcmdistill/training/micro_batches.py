"""Micro-batches of a process: their samples and random draws, functions of step and place only; and their loss by noise."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig, RunConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.sampler import SampleOrder
from lcmdistill.data.teacher_cache import cached_noise_index
from lcmdistill.diffusion.random import Rng

NOISE_BINS = 10
"parts of the way from clean to noise that the loss is logged for"


def sample_plan(
    config: RunConfig, dataset: LatentDataset, rank: int, world: int, first_step: int, device: torch.device
) -> Iterator[tuple[Rng, list[int]]]:
    """Yield the draws and the sample indices of each of a process's micro-batches, to the end of the run.

    Args:
        config: The resolved configuration.
        dataset: The prepared samples.
        rank: The process.
        world: The number of processes.
        first_step: The optimizer step to start at.
        device: Where the draws go.
    """
    optim, seed, size, cached_draws = config.optim, config.run.seed, len(dataset), config.data.teacher_cache_samples
    global_batch = optim.batch_size * optim.gradient_accumulation_steps * world
    order = SampleOrder(size, seed, global_batch, dataset.shapes)
    for step in range(first_step, optim.max_train_steps):
        for micro in range(optim.gradient_accumulation_steps):
            places = places_of(optim, micro, rank, world)
            indices = order.indices(step, places)
            fixed_draws = None
            if cached_draws:
                draws = cached_noise_index(step, places, global_batch, size, cached_draws)
                fixed_draws = list(zip(indices, draws, strict=True))
            yield Rng(seed, step, places, device, fixed_draws), indices


def places_of(optim: OptimConfig, micro: int, rank: int, world: int) -> range:
    """Return the places of a process's micro-batch in the global batch.

    Args:
        optim: The optimizer's settings.
        micro: Which micro-batch of the step it is.
        rank: The process.
        world: The number of processes.
    """
    first = (micro * world + rank) * optim.batch_size
    return range(first, first + optim.batch_size)


def bin_by_noise(losses: Tensor, noise_level: Tensor) -> Tensor:
    """Sum the losses, and count them, in each of NOISE_BINS, (2, NOISE_BINS). losses, noise_level: (B,)."""
    bins = torch.arange(NOISE_BINS, device=losses.device)
    member = (noise_level * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)[:, None] == bins
    return torch.stack([(member * losses[:, None]).sum(0), member.sum(0).to(losses.dtype)])
