"""Objectives: exact on the Gaussian oracle to the solver's order, and equal to a plain Algorithm 1."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, vp_schedule
from lcmdistill.objectives.ct import ConsistencyTraining, ImprovedConsistencyTraining
from tests.support.objectives import NULL, SD15, asked_of, gaussian_batch
from tests.support.oracle import oracle_models


@pytest.mark.parametrize(
    ("step", "scales", "mu"), [(0, 2, 0.9025), (1, 3, 0.95), (200_000, 101, 0.998975), (800_000, 201, 0.999487)]
)
def test_golden_curriculum_of_consistency_training(step: int, scales: int, mu: float) -> None:
    objective = ConsistencyTraining(s1=200, mu0=0.95, curriculum_steps=800_000)
    assert objective.scales(step) == scales
    assert objective.ema_decay_at(step) == pytest.approx(mu, rel=1e-6)


def test_a_curriculum_stays_at_its_end() -> None:
    for objective in (ConsistencyTraining(curriculum_steps=100), ImprovedConsistencyTraining(curriculum_steps=100)):
        assert objective.scales(100) == objective.scales(10**6) == objective.s1 + 1


def test_golden_curriculum_of_ict() -> None:
    """N = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2(s1 / s0) + 1)): eight grids, each for K / 8 steps."""
    objective = ImprovedConsistencyTraining(curriculum_steps=400_000)
    found = [objective.scales(50_000 * i) for i in range(8)]
    assert found == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert objective.scales(49_999) == 11
    assert objective.ema_decay_at(0) == objective.ema_decay_at(399_999) == 0.0


def test_ict_s_times_are_its_discretised_lognormal() -> None:
    """Song & Dhariwal 2023, sec. 3.5, in plain numbers, on the grid of 11 points."""
    schedule = KarrasSchedule()
    sigmas = schedule.grid(11).tolist()
    ends = [math.erf((math.log(x) + 1.1) / (math.sqrt(2) * 2.0)) for x in sigmas]
    mass = [b - a for a, b in pairwise(ends)]
    t, count = asked_times(ImprovedConsistencyTraining(), schedule, 4000)
    assert count == pytest.approx([4000 * m / sum(mass) for m in mass], abs=4 * math.sqrt(1000))
    assert set(t.tolist()) <= set(schedule.grid(11)[1:].tolist())


def asked_times(objective: ConsistencyTraining, schedule: NoiseSchedule, draws: int) -> tuple[Tensor, list[int]]:
    grid = schedule.grid(objective.scales(0))
    n = objective._draw(schedule, grid, Rng(0, 0, range(draws)))
    return grid[n + 1], n.bincount(minlength=len(grid) - 1).tolist()


def test_ict_weighs_a_pair_by_its_distance_in_sigma() -> None:
    batch, rng, models = gaussian_batch(64), Rng(0, 0, range(64)), oracle_models(KarrasSchedule(), NULL)
    plain, weighed = (
        models.loss(ImprovedConsistencyTraining(weighting=weighting), batch, rng)
        for weighting in ("uniform", "inverse")
    )
    ((t, _),), ((s, _),) = (asked_of("ict", KarrasSchedule())[role] for role in ("student", "target"))
    torch.testing.assert_close(weighed, plain / (t - s), rtol=1e-5, atol=0)


def test_a_grid_finer_than_the_table_lies_between_its_steps() -> None:
    grid = vp_schedule(SD15).grid(1281)
    assert grid.is_floating_point()
    assert (grid.diff() > 0).all()
    models = oracle_models(vp_schedule(SD15), NULL)
    objective = ImprovedConsistencyTraining(curriculum_steps=1)
    loss = models.loss(objective, gaussian_batch(32), Rng(0, 7, range(32)))
    assert objective.scales(7) == 1281
    assert loss.isfinite().all()
