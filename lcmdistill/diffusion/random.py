"""Random draws that are a function of (seed, stream, step, place in the global batch)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcmdistill.utils.device import copy_to_device


@dataclass(frozen=True)
class Rng:
    """Random draws that depend on (seed, stream, step, place) only: there is no state to save or to share.

    However a global batch is divided into processes and micro-batches, a sample gets the same noise, times and omega; a
    resumed run needs its step number only. Draws are made on the CPU, with one generator per sample, so that they are the
    same on every device.

    Attributes:
        seed: The seed of the run.
        step: The optimizer step.
        places: Each sample's place in the global batch.
        device: Where the draws go.
        fixed_draws: With cached teacher outputs, the (sample, draw) of each place. All draws then depend on these instead
            of step and place, except those that are requested as `fresh`.
    """

    seed: int
    step: int
    places: Sequence[int]
    device: torch.device | str = "cpu"
    fixed_draws: Sequence[tuple[int, int]] | None = None

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Draw standard normal values, (B, *shape) fp32."""
        return copy_to_device(
            torch.stack([torch.randn(*shape, generator=g) for g in self._generators(stream)]), self.device
        )

    def uniform(self, stream: str, *, fresh: bool = False) -> Tensor:
        """Draw from [0, 1), (B,) fp32. fresh: new at every step, for values that no teacher output depends on."""
        draws = [torch.rand(1, generator=g) for g in self._generators(stream, fresh=fresh)]
        return copy_to_device(torch.cat(draws), self.device)

    def integers(self, stream: str, high: int) -> Tensor:
        """Draw integers from 0 to high - 1, (B,) int64."""
        draws = [torch.randint(high, (1,), generator=g) for g in self._generators(stream)]
        return copy_to_device(torch.cat(draws), self.device)

    def _generators(self, stream: str, *, fresh: bool = False) -> list[torch.Generator]:
        if self.fixed_draws is not None and not fresh:
            owners = [("kept", *sample) for sample in self.fixed_draws]
        else:
            owners = [(self.step, place) for place in self.places]
        return [torch.Generator().manual_seed(derive_seed(self.seed, stream, *owner)) for owner in owners]


def seed_dropout(rng: Rng) -> None:
    """Seed torch's global generators, which dropout layers draw from, with a seed of the rng."""
    torch.random.default_generator.manual_seed(derive_seed(rng.seed, "dropout", rng.step, *rng.places))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(derive_seed(rng.seed, "dropout", rng.step, *rng.places))


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from all parts: one seed becomes many named streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
