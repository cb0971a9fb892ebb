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
