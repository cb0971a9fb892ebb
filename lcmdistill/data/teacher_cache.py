"""Cached teacher outputs: a step then takes four forwards' worth of arithmetic instead of six.

The step of DDIM or Euler under guidance is linear in omega, so that one output with the prompt and one without serve every
omega, full students and LoRAs, and every later run on the same data. The price is diversity: a sample is only met at the
`draws` noises and times that were precomputed, and not at fresh ones.

Shapes: n samples of a chunk, d draws per sample, B batch, C h w latents.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.data.chunks import PART, is_complete, joined, kept_if_interrupted, read_intact, write_tensors
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.eviction import cache_evicted_error, claim_folder
from lcmdistill.data.loader import batch_of
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, RawNetwork, TeacherNetwork, x0_eps_network
from lcmdistill.objectives.base import Objective
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.device import copy_to_device
from lcmdistill.utils.errors import UsageError

CHUNK = 64
"samples per file"
PROBED = 512
"the times of so many samples tell two ways of drawing them apart"


def check_teacher_cache(objective: Objective, draws: int) -> None:
    """Raise UsageError for a method whose teacher outputs cannot be computed before the run."""
    if draws < 0:
        raise UsageError(f"data.teacher_cache_samples is {draws}; it must be at least 0, which caches nothing")
    if not draws:
        return
    if not hasattr(objective, "teacher_step"):
        raise UsageError(
            "data.teacher_cache_samples caches teacher outputs, and this objective evaluates its teacher at the student's own "
            "samples; use 0"
        )
    forwards = objective.num_forwards.get("teacher", 0)
    if forwards == (1 if getattr(objective, "guidance", "free") == "free" else 2):
        return
    if not forwards:
        raise UsageError("data.teacher_cache_samples caches teacher outputs, and this objective has no teacher; use 0")
    solver = getattr(objective, "solver", "")
    raise UsageError(
        f"data.teacher_cache_samples caches one teacher evaluation per step, and {solver} takes two; "
        "use --solver ddim or euler"
    )


def cached_noise_index(step: int, places: Sequence[int], global_batch: int, size: int, draws: int) -> list[int]:
    """Return which of its cached draws each sample uses: another one in each epoch, in turn."""
    return [(step * global_batch + place) // size % draws for place in places]


class TeacherOutputCache:
    """The cached raw outputs of a teacher, memory-mapped."""

    def __init__(self, folder: Path, size: int, prediction_type: str) -> None:
        """Raises RunError if some of them are no longer there."""
        self.folder = folder
        self._prediction_type = prediction_type
        try:
            self._chunks = [safe_open(_path(folder, first), framework="pt") for first in range(0, size, CHUNK)]
        except FileNotFoundError:
            raise cache_evicted_error(folder) from None
        self._names = sorted(self._chunks[0].keys())  # "cond" first, in the order of the network's batch

    def teacher(self, rng: Rng, schedule: NoiseSchedule, null: Conditioning) -> TeacherNetwork:
        """Return a teacher that reads its outputs for the rng's fixed draws instead of computing them."""
        assert rng.fixed_draws is not None
        rows = [(self._chunks[index // CHUNK], index % CHUNK, draw) for index, draw in rng.fixed_draws]
        read = [chunk.get_slice(name)[i, draw] for name in self._names for chunk, i, draw in rows]
        output = copy_to_device(torch.stack(read), rng.device).float()
        return TeacherNetwork(x0_eps_network(lambda z, t, c, w: output, schedule, self._prediction_type), null)


def precompute(
    root: Path,
    objective: Objective,
    raw: RawNetwork,
    prediction_type: str,
    schedule: NoiseSchedule,
    null: Conditioning,
    dataset: LatentDataset,
    cache_key: Mapping[str, Any],
    *,
    seed: int,
    draws: int,
    caption_drop: float,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Path:
    """Compute this rank's share of the missing outputs, by the objective's own `teacher_step`.

    Args:
        root: The cache; the outputs go to a folder under it.
        objective: The method, whose teacher takes one evaluation per step.
        raw: The teacher's network.
        prediction_type: What it predicts.
        schedule: The teacher's schedule, on the device.
        null: The empty prompt, B = 1.
        dataset: The prepared samples.
        cache_key: What tells teacher and data from others.
        seed: The run's seed.
        draws: Noises and times per sample.
        caption_drop: The share of captions that are replaced by the empty prompt.
        batch_size: Samples per forward.
        device: Where the network is.
        rank: This process.
        world: The number of processes.
        on_progress: Called with the number of outputs that are done.

    Returns:
        The folder of the outputs.
    """
    size = len(dataset)
    probed = [(i, 0) for i in range(min(size, PROBED))]
    times, _ = objective.sample_timesteps(schedule, Rng(seed, 0, range(len(probed)), device, fixed_draws=probed))
    guidance = getattr(objective, "guidance", "free")  # whether the empty prompt is evaluated, too
    key = {**cache_key, "guidance": guidance, "size": size, "seed": seed, "draws": draws, "caption_drop": caption_drop}
    folder = claim_folder(root / "teacher-outputs" / digest([key, times.tolist()]))
    for number, first in enumerate(range(0, size, CHUNK)):
        path = _path(folder, first)
        if number % world == rank and not is_complete(path):
            pairs = [(i, d) for i in range(first, min(first + CHUNK, size)) for d in range(draws)]
            interrupted = path.with_suffix(PART)
            before = read_intact(interrupted)
            parts: list[dict[str, Tensor]] = [before[0]] if before else []
            with kept_if_interrupted(interrupted, lambda parts=parts: joined(parts)):
                for start in range(sum(len(part["cond"]) for part in parts), len(pairs), batch_size):
                    on_progress(first * draws + start)
                    some = pairs[start : start + batch_size]
                    rng = Rng(seed, 0, range(len(some)), device, fixed_draws=some)
                    batch = batch_of(dataset.read([index for index, _ in some]), rng, null, caption_drop)
                    parts.append(_outputs(objective, raw, prediction_type, schedule, null, batch, rng))
            write_tensors(path, {name: rows.unflatten(0, (-1, draws)) for name, rows in joined(parts).items()})
            interrupted.unlink(missing_ok=True)
        on_progress(min(first + CHUNK, size) * draws)
    return folder


def _outputs(
    objective: Objective,
    raw: RawNetwork,
    prediction_type: str,
    schedule: NoiseSchedule,
    null: Conditioning,
    batch: Batch,
    rng: Rng,
) -> dict[str, Tensor]:
    """Return the teacher's raw outputs in one step of a batch: "cond" and, under guidance, "null", each (B, C, h, w) fp16."""
    outputs: list[Tensor] = []

    def recorded(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        outputs.append(raw(z, t, c, w))
        return outputs[-1]

    with torch.no_grad():
        teacher = TeacherNetwork(x0_eps_network(recorded, schedule, prediction_type), null)
        objective.teacher_step(teacher, schedule, batch, rng)
    (output,) = outputs
    named = zip(("cond", "null"), output.split(len(batch.latents)), strict=False)
    return {name: value.half().cpu() for name, value in named}


def _path(folder: Path, first: int) -> Path:
    return folder / f"{first:08d}.safetensors"
