"""The pair (x0, eps): every prediction type is turned into it and back, and guidance is c + w (c - null)."""

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import EDM, FLOW, PREDICTION_TYPES, X0Eps, guided, to_x0_eps
from lcmdistill.diffusion.schedules import vp_schedule

# What a perfect network of each type puts out.
OUTPUTS = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
}


def level(*alphas: float) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of a variance-preserving schedule, worked out in float64."""
    alpha = torch.tensor(alphas, dtype=torch.float64).view(-1, 1, 1, 1)
    return alpha.float(), (1 - alpha**2).sqrt().float()


def pair(batch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 6, 6, generator=g), torch.randn(batch, 4, 6, 6, generator=g)


def test_every_prediction_type_is_covered() -> None:
    assert set(OUTPUTS) == set(PREDICTION_TYPES)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_round_trip(kind: str) -> None:
    schedule = vp_schedule({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    t = torch.tensor([0, 1, 19, 500, 979, 999])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, eps = pair(len(t))
    z = alpha * x0 + sigma * eps
    found = to_x0_eps(OUTPUTS[kind](x0, eps, alpha, sigma), z, alpha, sigma, kind)
    # a division by alpha_999 = .068 or sigma_0 = .029 magnifies the rounding of z
    torch.testing.assert_close(found.x0, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.eps, eps, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("alpha_value", [0.0, 1.0], ids=["alpha = 0", "sigma = 0"])
def test_round_trip_at_the_ends(kind: str, alpha_value: float) -> None:
    alpha, sigma = level(alpha_value)
    x0, eps = pair(1)
    z = alpha * x0 + sigma * eps
    output = OUTPUTS[kind](x0, eps, alpha, sigma).requires_grad_()
    found = to_x0_eps(output, z, alpha, sigma, kind)
    # what the output cannot name is 0; all else is exact
    lost_x0 = kind == "epsilon" and alpha_value == 0
    lost_eps = kind == "sample" and alpha_value == 1
    torch.testing.assert_close(found.x0, torch.zeros_like(x0) if lost_x0 else x0)
    torch.testing.assert_close(found.eps, torch.zeros_like(eps) if lost_eps else eps)
    (gradient,) = torch.autograd.grad(found.x0.sum() + found.eps.sum(), output)
    assert gradient.isfinite().all()


def test_round_trip_of_a_velocity() -> None:
    """Exact from clean latents, sigma = 0, to pure noise, sigma = 1."""
    sigma = torch.tensor([0.0, 0.003, 0.5, 0.9, 1.0]).view(-1, 1, 1, 1)
    x0, eps = pair(5)
    found = to_x0_eps(eps - x0, (1 - sigma) * x0 + sigma * eps, 1 - sigma, sigma, FLOW)
    torch.testing.assert_close(found.x0, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.eps, eps, atol=1e-6, rtol=0)


def test_round_trip_of_a_preconditioned_network() -> None:
    """x0 = c_skip z + c_out F (Karras et al. 2022, Eq. 7 and Table 1), from sigma_min to sigma_max and at sigma = 0."""
    sigma = torch.tensor([0.0, 0.002, 0.5, 3.0, 80.0]).view(-1, 1, 1, 1)
    x0, eps = pair(5)
    z, square = x0 + sigma * eps, sigma**2 + 0.25
    c_skip, c_out = 0.25 / square, 0.5 * sigma / square.sqrt()
    output = torch.where(sigma > 0, (x0 - c_skip * z) / c_out.clamp(min=1e-6), -2 * eps)
    found = to_x0_eps(output, z, torch.ones_like(sigma), sigma, EDM)
    torch.testing.assert_close(found.x0, x0, atol=3e-5, rtol=0)
    # at sigma = 0 z tells nothing of eps: the limit is -F / 2, up to the part of z that c_skip keeps
    torch.testing.assert_close(found.eps[1:], eps[1:], atol=5e-4, rtol=0)
    assert found.eps.isfinite().all()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_half_precision_outputs_are_converted_in_fp32(kind: str) -> None:
    alpha, sigma = level(0.0683, 0.9996)
    output, z = (tensor.bfloat16() for tensor in pair(2))
    found, expected = (
        to_x0_eps(*tensors, alpha, sigma, kind) for tensors in ((output, z), (output.float(), z.float()))
    )
    assert found.x0.dtype == found.eps.dtype == torch.float32
    assert torch.equal(found.x0, expected.x0)
    assert torch.equal(found.eps, expected.eps)


def test_unknown_type_is_refused() -> None:
    x0, eps = pair(1)
    with pytest.raises(ValueError, match="choose from epsilon, sample, v_prediction, edm, flow_prediction"):
        to_x0_eps(eps, x0, *level(0.5), "velocity")


def test_guidance_combines_both_halves_per_sample() -> None:
    (x0_c, eps_c), (x0_n, eps_n) = pair(3), reversed(pair(3))
    x0, eps = guided(X0Eps(x0_c, eps_c), X0Eps(x0_n, eps_n), torch.tensor([0.0, -1.0, 7.5]))
    for found, c, n in ((x0, x0_c, x0_n), (eps, eps_c, eps_n)):
        assert torch.equal(found[0], c[0])  # w = 0, guidance_scale = 1: the prompt alone
        torch.testing.assert_close(found[1], n[1])  # w = -1, guidance_scale = 0: the null prompt alone
        torch.testing.assert_close(found[2], n[2] + 8.5 * (c[2] - n[2]))  # diffusers' formula, guidance_scale = w + 1


def test_guided_pair_still_names_its_z() -> None:
    alpha, sigma = level(0.9, 0.3)
    z = pair(2)[0]
    cond, null = (to_x0_eps(output, z, alpha, sigma, "epsilon") for output in pair(2))
    x0, eps = guided(cond, null, torch.tensor([2.0, 14.0]))
    torch.testing.assert_close(alpha * x0 + sigma * eps, z, atol=1e-4, rtol=0)
