"""Helpers that several tests share."""

from typing import Any

import torch
from torch import Tensor


def noise(batch: int = 1, side: int = 8) -> Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0))


def images(batch: int = 2, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def same_weights(a: Any, b: Any) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


EDGES = ("quant_conv.", "post_quant_conv.")
"the layers of a VAE that absorb another scale of its latents"


def same_part(a: Any, b: Any) -> bool:
    """Whether two parts are equal weight for weight; VAEs of different scales but for their edges, and in what they compute."""
    if not hasattr(a, "decoder") or a.config.scaling_factor == b.config.scaling_factor:
        return same_weights(a, b)
    theirs, is_exact = b.state_dict(), True
    for name, value in a.state_dict().items():
        is_exact &= name.startswith(EDGES) or torch.equal(value, theirs[name])
    return is_exact and all(
        float((x - y).abs().max() / y.abs().max()) < 2e-6
        for x, y in zip(in_network_scale(a), in_network_scale(b), strict=True)
    )


@torch.no_grad()
def in_network_scale(vae: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An image decoded from a network's latents, and the mean and the standard deviation that a network gets of an image."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    z = torch.randn(1, vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    posterior = vae.encode(images(1)).latent_dist
    return vae.decode(z / scale + shift).sample, scale * (posterior.mean - shift), scale * posterior.std
