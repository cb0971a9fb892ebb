"""The EMA: mu weighs the old target, in place."""

import pytest
import torch
from torch import nn

from lcmdistill.diffusion.ema import ema_update


def test_update_is_in_place_and_mu_weighs_the_target() -> None:
    target, online = [torch.full((2, 3), 1.0), torch.full((4,), 2.0)], [torch.full((2, 3), 5.0), torch.full((4,), 0.0)]
    first = target[0]
    ema_update(target, online, mu=0.75)
    torch.testing.assert_close(target, [torch.full((2, 3), 2.0), torch.full((4,), 1.5)])
    assert target[0] is first
    assert online[0].eq(5).all()


@pytest.mark.parametrize(("mu", "expected"), [(0.0, 5.0), (1.0, 1.0)])
def test_the_ends_copy_and_freeze_exactly(mu: float, expected: float) -> None:
    target = [torch.tensor([1.0])]
    ema_update(target, [torch.tensor([5.0])], mu)
    assert target[0].item() == expected


def test_the_papers_rate_follows_its_formula() -> None:
    target, online, mu = [torch.tensor([1.0])], [torch.tensor([0.0])], 0.999943
    for _ in range(1000):
        ema_update(target, online, mu)
    assert target[0].item() == pytest.approx(mu**1000, rel=1e-4)


def test_parameters_are_updated_outside_of_autograd() -> None:
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = (0.95 * target.weight + 0.05 * online.weight).detach()
    ema_update(target.parameters(), online.parameters(), 0.95)
    torch.testing.assert_close(target.weight.detach(), expected)
    assert target.weight.is_leaf
    assert target.weight.grad_fn is None


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="1 tensors but the online network has 2"):
        ema_update([torch.zeros(1)], [torch.zeros(1)] * 2, 0.5)
