"""Distances d(a, b) between two batches, each (B, C, h, w), as (B,) fp32: the mean over a sample's elements."""

from collections.abc import Callable

from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference (Luo et al. 2023, sec. 5)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference (Song et al. 2023, sec. 5)."""
    return (a.float() - b.float()).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """Return the mean of sqrt(d^2 + c^2) - c, element-wise (Song & Dhariwal 2023, sec. 3.3; c as in the public LCM scripts)."""
    return (((a.float() - b.float()).square() + c**2).sqrt() - c).flatten(1).mean(1)


def norm_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """Return sqrt(|d|^2 + c^2) - c of the norm of the difference (Song & Dhariwal 2023, sec. 3.3).

    c: by default .00054 sqrt(number of elements); 0 is the norm.
    """
    difference = (a.float() - b.float()).flatten(1)
    width = 0.00054 * difference.shape[1] ** 0.5 if c is None else c
    # The root of 0 has no gradient.
    return (difference.square().sum(1) + width**2).clamp(min=1e-20).sqrt() - width


DISTANCES: dict[str, LossFunction] = {"huber": pseudo_huber, "norm-huber": norm_huber, "l1": l1, "l2": l2}
