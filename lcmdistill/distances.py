"""Distances d(a, b) between two batches, each (B, C, h, w), as (B,) fp32: the mean over a sample's elements."""

from collections.abc import Callable

from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference (Luo et al. 2023, sec. 5)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c, element-wise (Song & Dhariwal 2023, sec. 3.3; c as in the public LCM scripts)."""
    return (((a.float() - b.float()).square() + c**2).sqrt() - c).flatten(1).mean(1)


DISTANCES: dict[str, Distance] = {"huber": pseudo_huber, "l2": l2}
