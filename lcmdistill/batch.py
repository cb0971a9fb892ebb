"""What an objective is handed: a batch, its conditioning, the networks, and its random draws.

Shapes: B batch, C latent channels, h w latent size, L tokens, D width of a token's embedding.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcmdistill.distances import Distance
from lcmdistill.prediction import X0Eps, network_input, to_x0_eps
from lcmdistill.schedule import NoiseSchedule


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides z, t and omega: named tensors, each (B, ...).

    "prompt_embeds" (B, L, D) with a prompt; what else there is, is between a family's encoder and its network.
    """

    values: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same on another device, its floats in another dtype."""
        return self._each(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def expand(self, size: int) -> "Conditioning":
        """One sample's conditioning repeated for a batch of `size`, without a copy."""
        return self._each(lambda value: value.expand(size, *value.shape[1:]))

    def cat(self, other: "Conditioning") -> "Conditioning":
        """Both, one after the other, along the batch."""
        return Conditioning({k: torch.cat([v, other[k].to(v.dtype)]) for k, v in self.values.items()})

    def __or__(self, other: "Conditioning") -> "Conditioning":
        """All that both tell of the same samples."""
        return Conditioning({**self.values, **other.values})

    def with_prompt(self, prompt: "Conditioning") -> "Conditioning":
        """The same samples under one other prompt: what it does not name (sizes, say) stays each sample's own.

        prompt: B = 1.
        """
        told = {k: prompt[k].to(v.dtype).expand_as(v) for k, v in self.values.items() if k in prompt.values}
        return Conditioning({**self.values, **told})

    def replace_where(self, mask: Tensor, prompt: "Conditioning") -> "Conditioning":
        """`with_prompt` where mask is true, else this. mask: (B,) bool."""
        other = self.with_prompt(prompt)
        return Conditioning(
            {k: torch.where(mask.view(-1, *[1] * (v.ndim - 1)), other[k], v) for k, v in self.values.items()}
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning({name: change(value) for name, value in self.values.items()})


@dataclass(frozen=True)
class Batch:
    """Clean latents, (B, C, h, w) fp32, and what they show."""

    latents: Tensor
    cond: Conditioning


# (z, t, c, w) -> (x0, eps); w is None for a network without an omega input.
Network = Callable[[Tensor, Tensor, Conditioning, Tensor | None], X0Eps]
RawNetwork = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]


@dataclass(frozen=True)
class Models:
    """The networks of a distillation, each giving (x0, eps), on one schedule. null: the empty prompt alone, B = 1.

    perceptual: LPIPS, where its weights are given; has_dropout: whether any of the networks has dropout that acts.
    """

    schedule: NoiseSchedule
    teacher: Network
    student: Network
    target: Network
    null: Conditioning
    perceptual: Distance | None = None
    has_dropout: bool = False

    def seed_dropout(self, rng: "Rng") -> None:
        """Let what dropout draws from here on be the rng's own; nothing happens where there is none."""
        if self.has_dropout:
            seed_dropout(rng)


def x0_eps_network(raw: RawNetwork, schedule: NoiseSchedule, prediction_type: str) -> Network:
    """A network that speaks its own prediction type, as one that speaks (x0, eps): the border."""

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return to_x0_eps(raw(*network_input(z, t, sigma, prediction_type), c, w), z, alpha, sigma, prediction_type)

    return network


@dataclass(frozen=True)
class Rng:
    """Random draws that belong to (seed, stream, step, place): there is no state to save, to share or to lose.

    places: each sample's place in the global batch. However a global batch is cut into processes and micro-batches, a
    sample meets the same noise, times and omega; a resumed run needs its step number and nothing else. Draws are made
    on the CPU, one generator a sample, so that they are the same on every device.
    kept: where the teacher was asked beforehand, which sample of the data stands at each place, and for the how-manieth
    time: the draws of what it was asked (KEPT) belong to these, and not to step and place.
    """

    seed: int
    step: int
    places: Sequence[int]
    device: torch.device | str = "cpu"
    kept: Sequence[tuple[int, int]] | None = None

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, (B, *shape) fp32."""
        return onto(torch.stack([torch.randn(*shape, generator=g) for g in self._generators(stream)]), self.device)

    def uniform(self, stream: str) -> Tensor:
        """Uniform draws in [0, 1), (B,) fp32."""
        return onto(torch.cat([torch.rand(1, generator=g) for g in self._generators(stream)]), self.device)

    def integers(self, stream: str, high: int) -> Tensor:
        """Uniform draws from 0 to high - 1, (B,) int64."""
        draws = [torch.randint(high, (1,), generator=g) for g in self._generators(stream)]
        return onto(torch.cat(draws), self.device)

    def _generators(self, stream: str) -> list[torch.Generator]:
        if self.kept is not None and stream in KEPT:
            owners = [("kept", *sample) for sample in self.kept]
        else:
            owners = [(self.step, place) for place in self.places]
        return [torch.Generator().manual_seed(derive_seed(self.seed, stream, *owner)) for owner in owners]


KEPT = ("posterior", "caption-drop", "times", "noise")
"the streams that decide what a teacher is asked"


def onto(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on another device, without waiting for what that device is still at."""
    if torch.device(device).type != "cuda":
        return value.to(device)
    return value.contiguous().pin_memory().to(device, non_blocking=True)


def seed_dropout(rng: Rng) -> None:
    """Give torch's global generators a seed of the rng's own: dropout layers draw from nowhere else."""
    torch.random.default_generator.manual_seed(derive_seed(rng.seed, "dropout", rng.step, *rng.places))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(derive_seed(rng.seed, "dropout", rng.step, *rng.places))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: how one seed fans out into named streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
