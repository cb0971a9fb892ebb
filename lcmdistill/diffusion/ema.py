"""The exponential moving average behind the target network."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(target: Iterable[Tensor], online: Iterable[Tensor], mu: float) -> None:
    """Update the average in place: theta^- <- mu theta^- + (1 - mu) theta (Luo et al. 2023, Alg. 1).

    target, online: the same tensors in the same order; mu: in [0, 1]. One fused launch updates all.
    Raises ValueError if the lists differ in length.
    """
    old, new = list(target), list(online)
    if len(old) != len(new):
        raise ValueError(f"the target has {len(old)} tensors but the online network has {len(new)}")
    torch._foreach_lerp_(old, new, 1.0 - mu)
