"""The teacher's answers, asked once and kept: a step then takes four forwards' worth of arithmetic instead of six.

The step of DDIM or Euler under guidance is linear in omega, so that one answer with the prompt and one without serve every
omega, full students and LoRAs, and every later run on the same data. The price is diversity: a sample is met only at the
`draws` noises and times that the teacher was asked for, and no longer at fresh ones.

Shapes: n samples of a chunk, d draws of each, B batch, C h w latents.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.data.chunks import is_complete, write_tensors
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.eviction import cache_evicted_error
from lcmdistill.data.loader import batch_of
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Networks, RawNetwork, x0_eps_network
from lcmdistill.objectives.base import Objective, forwards, only
from lcmdistill.utils.device import copy_to_device
from lcmdistill.utils.errors import UsageError

CHUNK = 64
"samples in a file"

PEEKED = 512
"so many samples' times and more tell two ways of drawing them apart"


def check_teacher_cache(objective: Objective, schedule: NoiseSchedule, draws: int) -> None:
    """Raise UsageError for a method whose teacher cannot be asked beforehand."""
    if draws < 0:
        raise UsageError(
            f"data.teacher_cache_samples is {draws}; it must be at least 0, which asks the teacher at every step"
        )
    if not draws:
        return
    asked = forwards(objective, schedule).get("teacher", 0)
    if asked == (1 if getattr(objective, "guidance", "free") == "free" else 2):
        return
    problem = (
        "asks no teacher" if not asked else f"asks its teacher twice a step with {getattr(objective, 'solver', '')}"
    )
    raise UsageError(
        f"data.teacher_cache_samples keeps what the teacher answers, and this objective {problem}; "
        f"{'leave it at 0' if not asked else 'use --solver ddim or euler'}"
    )


def cached_noise_index(step: int, places: Sequence[int], global_batch: int, size: int, draws: int) -> list[int]:
    """The how-manieth of its kept draws each sample is met at: another one in each epoch, and round again."""
    return [(step * global_batch + place) // size % draws for place in places]


class TeacherOutputCache:
    """The kept raw outputs of a teacher, memory-mapped."""

    def __init__(self, folder: Path, size: int) -> None:
        """Raises RunError if some of them are no longer there."""
        self.folder = folder
        try:
            self._chunks = [safe_open(_path(folder, first), framework="pt") for first in range(0, size, CHUNK)]
        except FileNotFoundError:
            raise cache_evicted_error(folder) from None
        self._names = sorted(self._chunks[0].keys())  # "cond" first, as it is asked

    def teacher(self, asked: Sequence[tuple[int, int]], device: torch.device) -> RawNetwork:
        """A network that has the answers to these (sample, draw) by heart: with the prompts, or with them and without."""
        rows = [(self._chunks[index // CHUNK], index % CHUNK, draw) for index, draw in asked]
        # Read now, ahead of the step, and once for all who ask.
        read = [chunk.get_slice(name)[i, draw] for name in self._names for chunk, i, draw in rows]
        kept = copy_to_device(torch.stack(read), device).float()
        return lambda z, t, c, w: kept


def precompute(
    root: Path,
    objective: Objective,
    models: Networks,
    raw: RawNetwork,
    prediction_type: str,
    dataset: LatentDataset,
    about: Mapping[str, Any],
    *,
    seed: int,
    draws: int,
    caption_drop: float,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Ask for this rank's share of the answers that are not there yet, and return their folder under `root`.

    raw: the teacher; about: what tells teacher and data from others; draws: of each sample.
    """
    size = len(dataset)
    peeked = [(i, 0) for i in range(min(size, PEEKED))]
    times, _ = objective.pair(models.schedule, Rng(seed, 0, range(len(peeked)), device, kept=peeked))
    guidance = getattr(objective, "guidance", "free")  # whether the empty prompt is asked for, too
    named = {**about, "guidance": guidance, "size": size, "seed": seed, "draws": draws, "caption_drop": caption_drop}
    digest = hashlib.blake2b(json.dumps([named, times.tolist()], sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = root / "answers" / digest
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, size, CHUNK)):
        path = _path(folder, first)
        if number % world == rank and not is_complete(path):
            asked = [(i, d) for i in range(first, min(first + CHUNK, size)) for d in range(draws)]
            parts: list[dict[str, Tensor]] = []
            for start in range(0, len(asked), batch_size):
                on_progress(first * draws + start)
                some = asked[start : start + batch_size]
                rng = Rng(seed, 0, range(len(some)), device, kept=some)
                read = dataset.read([index for index, _ in some])
                batch = batch_of(read, rng, models.null, caption_drop)
                parts.append(_asked(objective, models, raw, prediction_type, batch, rng))
            write_tensors(path, {k: torch.cat([part[k] for part in parts]).unflatten(0, (-1, draws)) for k in parts[0]})
        on_progress(min(first + CHUNK, size) * draws)
    return folder


@torch.no_grad()
def _asked(
    objective: Objective, models: Networks, raw: RawNetwork, prediction_type: str, batch: Batch, rng: Rng
) -> dict[str, Tensor]:
    """What the objective asks its teacher, and is answered, (B, C, h, w) fp16 each: its own loss, with no other networks."""
    heard: list[Tensor] = []

    def listening(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        heard.append(raw(z, t, c, w))
        return heard[-1]

    teacher = x0_eps_network(listening, models.schedule, prediction_type)
    objective.loss(only(replace(models, teacher=teacher), "teacher"), batch, rng)
    (answer,) = heard
    named = zip(("cond", "null"), answer.split(len(batch.latents)), strict=False)
    return {name: value.half().cpu() for name, value in named}


def _path(folder: Path, first: int) -> Path:
    return folder / f"{first:08d}.safetensors"
