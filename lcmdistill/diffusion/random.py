"""Random draws that are a function of (seed, stream, step, place in the global batch)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcmdistill.utils.device import copy_to_device


@dataclass(frozen=True)
class Rng:
    """Random draws that belong to (seed, stream, step, place): there is no state to save, to share or to lose.

    places: each sample's place in the global batch. However a global batch is cut into processes and micro-batches, a
    sample meets the same noise, times and omega; a resumed run needs its step number and nothing else. Draws are made
    on the CPU, one generator a sample, so that they are the same on every device.
    fixed_draws: with cached teacher outputs, the (sample, draw) behind each place. All draws then belong to these and not
    to step and place, except those that are requested as `fresh`.
    """

    seed: int
    step: int
    places: Sequence[int]
    device: torch.device | str = "cpu"
    fixed_draws: Sequence[tuple[int, int]] | None = None

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, (B, *shape) fp32."""
        return copy_to_device(
            torch.stack([torch.randn(*shape, generator=g) for g in self._generators(stream)]), self.device
        )

    def uniform(self, stream: str, *, fresh: bool = False) -> Tensor:
        """Uniform draws in [0, 1), (B,) fp32. fresh: new at every step, for what no teacher output depends on."""
        draws = [torch.rand(1, generator=g) for g in self._generators(stream, fresh=fresh)]
        return copy_to_device(torch.cat(draws), self.device)

    def integers(self, stream: str, high: int) -> Tensor:
        """Uniform draws from 0 to high - 1, (B,) int64."""
        draws = [torch.randint(high, (1,), generator=g) for g in self._generators(stream)]
        return copy_to_device(torch.cat(draws), self.device)

    def _generators(self, stream: str, *, fresh: bool = False) -> list[torch.Generator]:
        if self.fixed_draws is not None and not fresh:
            owners = [("kept", *sample) for sample in self.fixed_draws]
        else:
            owners = [(self.step, place) for place in self.places]
        return [torch.Generator().manual_seed(derive_seed(self.seed, stream, *owner)) for owner in owners]


def seed_dropout(rng: Rng) -> None:
    """Give torch's global generators a seed of the rng's own: dropout layers draw from nowhere else."""
    torch.random.default_generator.manual_seed(derive_seed(rng.seed, "dropout", rng.step, *rng.places))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(derive_seed(rng.seed, "dropout", rng.step, *rng.places))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: how one seed fans out into named streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
