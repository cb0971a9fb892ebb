"""Distances: their formulas, one number a sample, and the two regimes of pseudo-Huber."""

import math

import pytest
import torch

from lcmdistill.diffusion.losses import DISTANCES, l2, pseudo_huber


def filled(*differences: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of batches, each sample of which differs by one number everywhere."""
    a = torch.randn(len(differences), 4, 5, 6, generator=torch.Generator().manual_seed(0))
    return a + torch.tensor(differences).view(-1, 1, 1, 1), a


def test_l2_is_the_mean_square_of_each_sample() -> None:
    torch.testing.assert_close(l2(*filled(0.0, 1.0, -3.0)), torch.tensor([0.0, 1.0, 9.0]))


def test_huber_is_element_wise() -> None:
    a, b = filled(0.0, 1.0, 0.002)
    expected = [math.sqrt(d * d + 1e-6) - 1e-3 for d in (0.0, 1.0, 0.002)]
    torch.testing.assert_close(pseudo_huber(a, b), torch.tensor(expected), atol=1e-6, rtol=0)
    half = torch.where(torch.arange(6) < 3, a, b)  # half of the elements differ: half of the distance
    torch.testing.assert_close(pseudo_huber(half, b)[1].item(), expected[1] / 2, atol=1e-6, rtol=0)


def test_huber_is_l1_far_away_and_l2_close_by() -> None:
    assert pseudo_huber(*filled(10.0)).item() == pytest.approx(10.0, rel=1e-3)
    assert pseudo_huber(*filled(0.1), c=100.0).item() == pytest.approx(0.1**2 / (2 * 100.0), rel=0.2)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_has_the_shape_dtype_and_gradient_of_a_loss(name: str) -> None:
    a, b = (tensor.bfloat16() for tensor in filled(0.0, 1.0))
    a.requires_grad_()
    d = DISTANCES[name](a, b)
    assert d.shape == (2,)
    assert d.dtype == torch.float32
    assert d[0] == 0
    d.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()  # also where a = b
