"""Easy Consistency Tuning: its curriculum in plain numbers, its times, its loss, and the same noise at both times."""

import math

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, vp_schedule
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.objectives.common import noise_ratio
from lcmdistill.objectives.ect import EasyConsistencyTuning
from tests.support.objectives import NULL, SD15, gaussian_batch
from tests.support.oracle import oracle_models

SCHEDULES: dict[str, NoiseSchedule] = {"Karras": KarrasSchedule(), "SD": vp_schedule(SD15)}

on_both = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def ratios(schedule: NoiseSchedule, step: int = 0, count: int = 400, **fields: float) -> tuple[Tensor, Tensor]:
    """sigma / alpha at the drawn times t and r."""
    objective = EasyConsistencyTuning(**{"curriculum_steps": 8, **fields})
    t, r = objective.sample_timesteps(schedule, Rng(0, step, range(count)))
    return noise_ratio(schedule, t), noise_ratio(schedule, r)


@pytest.mark.parametrize(
    ("step", "stage"), [(0, 0), (12_499, 0), (12_500, 1), (50_000, 4), (99_999, 7), (100_000, 7), (10**9, 7)]
)
def test_golden_stages(step: int, stage: int) -> None:
    assert EasyConsistencyTuning(curriculum_steps=100_000).stage_at(step) == stage


@on_both
@pytest.mark.parametrize(
    ("fields", "step", "power"),
    [({}, 0, 2), ({}, 3, 16), ({}, 7, 256), ({"q": 256, "stages": 1}, 0, 256)],
    ids=["first stage", "fourth stage", "last stage", "one stage"],
)
def test_golden_pairs(schedule: NoiseSchedule, fields: dict[str, float], step: int, power: int) -> None:
    """r = t (1 - n(t) / q^(stage + 1)), n(t) = 1 + 8 sigmoid(-t), and never below the first time."""
    first = float(noise_ratio(schedule, schedule.grid(2))[0])
    t, r = ratios(schedule, step, **fields)  # pyright: ignore[reportArgumentType]
    for found, ratio in zip(r.tolist(), t.tolist(), strict=True):
        n = 1 + 8 / (1 + math.exp(ratio))
        expected = max(first, ratio * (1 - n / power))
        # A VP table is interpolated between its time steps, in fp32.
        assert found == pytest.approx(expected, rel=2e-4)
    assert (t > r).all()


def test_times_are_the_lognormal_between_the_first_and_the_last() -> None:
    t, _ = ratios(KarrasSchedule(), count=4000)
    logs = t.log()
    assert 0.002 < t.min() < t.max() < 80
    for share, quantile in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816)):
        # The ends of the schedule leave out half a percent on each side.
        assert logs.quantile(share).item() == pytest.approx(-1.1 + 2 * quantile, abs=0.15)


@on_both
def test_both_times_have_the_same_noise(schedule: NoiseSchedule) -> None:
    batch, models = gaussian_batch(16), oracle_models(schedule, NULL)
    state = EasyConsistencyTuning().teacher_step(models.teacher, schedule, batch, Rng(0, 0, range(16)))
    noise = [
        (z - schedule.alpha(t) * batch.latents) / schedule.sigma(t)
        for z, t in ((state.z_t, state.t), (state.z_s, state.s))
    ]
    # Where sigma is small, fp32 leaves little of the noise in z.
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=2e-3)


def test_the_loss_is_the_norm_of_the_difference_over_t_minus_r() -> None:
    schedule, batch, rng = KarrasSchedule(), gaussian_batch(64), Rng(0, 0, range(64))
    models = oracle_models(schedule, NULL)
    square = (
        models.loss(EasyConsistencyTuning(distance="l2", weighting="uniform"), batch, rng) * batch.latents[0].numel()
    )
    t, s = EasyConsistencyTuning().sample_timesteps(schedule, rng)
    torch.testing.assert_close(models.loss(EasyConsistencyTuning(), batch, rng), square.sqrt() / (t - s))
    c = EasyConsistencyTuning(huber_c=0.5)
    torch.testing.assert_close(
        models.loss(c, batch, rng), ((square + 0.25).sqrt() - 0.5) / (t - s), rtol=1e-4, atol=1e-6
    )


def test_equal_images_give_finite_gradients() -> None:
    schedule, batch, rng = KarrasSchedule(), gaussian_batch(4), Rng(0, 0, range(4))
    constant = torch.zeros(1, requires_grad=True)

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        # f is the same at both times if x0 undoes the part of z.
        c_skip, c_out = schedule.boundary(t)
        return X0Eps(-c_skip / c_out.clamp(min=1e-6) * z + constant, z)

    models = oracle_models(schedule, NULL)
    own = EasyConsistencyTuning(q=256, stages=1)
    loss = models.with_network("student", network).with_network("target", network).loss(own, batch, rng)
    loss.sum().backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()
