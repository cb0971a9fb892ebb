"""What an objective is handed: a batch, its conditioning, the networks, and its random draws.

Shapes: B batch, C latent channels, h w latent size, L tokens, D width of a token's embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcmdistill.diffusion.losses import LossFunction
from lcmdistill.diffusion.parameterization import X0Eps, network_input, to_x0_eps
from lcmdistill.diffusion.random import Rng, seed_dropout
from lcmdistill.diffusion.schedules import NoiseSchedule


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
class Networks:
    """The networks of a distillation, each giving (x0, eps), on one schedule. null: the empty prompt alone, B = 1.

    perceptual: LPIPS, where its weights are given; has_dropout: whether any of the networks has dropout that acts.
    """

    schedule: NoiseSchedule
    teacher: Network
    student: Network
    target: Network
    null: Conditioning
    perceptual: LossFunction | None = None
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
