"""PCM: edges where diffusers' DDIM stops, pairs that never straddle one, and an exact student that lands on all of them."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lcmdistill.diffusion.flow import FlowSchedule, sampled_sigmas
from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import phase_edges, vp_schedule
from lcmdistill.objectives.pcm import PhasedConsistency, phase_grid
from lcmdistill.teachers.schedulers import vp_scheduler
from tests.support.objectives import NULL, SD15, gaussian_batch
from tests.support.oracle import Gaussian, oracle_models, prompt_mean, smooth_schedule

PHASES = [1, 2, 4, 5, 8, 16]

GRIDS = pytest.mark.parametrize("skip", [25, 20, 10], ids=["N=40", "N=50", "N=100"])


def sampler(objective: PhasedConsistency, steps: int) -> Any:
    """The scheduler of a student's pipeline."""
    config = {**SD15, "num_train_timesteps": 1000}
    scheduler = vp_scheduler(config, objective.info.scheduler, objective.info.scheduler_options(objective, 1000))
    scheduler.set_timesteps(steps)
    return scheduler


@GRIDS
@pytest.mark.parametrize("phases", PHASES)
def test_the_sampler_visits_the_edges_and_trained_times_only(phases: int, skip: int) -> None:
    objective = PhasedConsistency(phases=str(phases), skip=skip)
    assert objective.info.steps(objective) == (phases, phases, phases)
    visited = sampler(objective, phases).timesteps.tolist()
    assert visited == phase_edges(1000, phases)[1:].flip(0).tolist()
    assert set(visited) <= set(phase_grid(1000, phases, skip)[:, 0].tolist())


@GRIDS
@pytest.mark.parametrize("phases", PHASES)
def test_a_pair_never_straddles_an_edge(phases: int, skip: int) -> None:
    edges, grid = phase_edges(1000, phases), phase_grid(1000, phases, skip)
    t, s, e = grid.unbind(1)
    assert ((e <= s) & (s < t) & (t - s <= skip)).all()
    for edge in edges.tolist():
        assert not ((s < edge) & (edge < t)).any()
    assert torch.equal(e, edges[torch.searchsorted(edges, s.contiguous(), right=True) - 1])
    assert len(grid) == len(set(t.tolist()))


@pytest.mark.parametrize(
    ("phases", "skip"), [(phases, skip) for phases in PHASES for skip in (25, 20, 10) if 1000 // skip % phases == 0]
)
def test_the_grid_is_the_published_one_where_the_phases_divide_it(phases: int, skip: int) -> None:
    """Published: t_i = (i + 1) T / N - 1, edges at the indices floor(linspace(0, N, phases, endpoint=False))."""
    n = 1000 // skip
    indices = np.floor(np.linspace(0, n, phases, endpoint=False)).astype(int)
    expected = []
    for i in range(n):
        edge = int(indices[indices <= i].max())
        expected.append([(i + 1) * skip - 1, max(i * skip - 1, 0), max(edge * skip - 1, 0)])
    assert sorted(phase_grid(1000, phases, skip).tolist()) == expected


def test_a_range_of_phases_draws_every_schedule_of_it() -> None:
    objective = PhasedConsistency(phases="4-8")
    assert objective.info.steps(objective).text == "4 steps (4 to 8)"
    t, s, e = objective.sample_phases(smooth_schedule(1000), Rng(0, 0, range(4000)))
    union = {edge for n in range(4, 9) for edge in phase_edges(1000, n)[:-1].tolist()}
    assert set(e.tolist()) == union
    assert {edge for n in range(4, 9) for edge in phase_edges(1000, n)[1:].tolist()} <= set(t.tolist())
    assert ((e <= s) & (s < t)).all()


def test_the_same_times_are_drawn_again_and_every_time_is_drawn() -> None:
    objective, schedule, rng = PhasedConsistency(phases="2"), smooth_schedule(1000), Rng(0, 0, range(3000))
    t, s = objective.sample_timesteps(schedule, rng)
    again = objective.sample_phases(schedule, rng)
    assert torch.equal(t, again[0])
    assert torch.equal(s, again[1])
    counts = t.bincount(minlength=1000)[torch.arange(19, 1000, 20)]
    assert counts.sum() == 3000
    assert counts.min() > 3000 / 50 / 2


def test_one_phase_is_consistency_distillation_without_boundary_scalings() -> None:
    schedule, rng, batch = vp_schedule(SD15), Rng(0, 0, range(16)), gaussian_batch(16)
    models = oracle_models(schedule, NULL)
    wrong = models.with_network("student", lambda z, t, c, w: type(models.teacher.network(z, t, c, w))(z, 0.5 * z))
    objective = PhasedConsistency(phases="1", guidance="free", distance="l2")
    t, s = objective.sample_timesteps(schedule, rng)
    z_t = schedule.diffuse(batch.latents, rng.normal("noise", batch.latents.shape[1:]), t)
    z_s = schedule.diffuse(*models.teacher.network(z_t, t, batch.cond, None), s)
    first = torch.zeros_like(t)
    goal = schedule.diffuse(*models.teacher.network(z_s, s, batch.cond, None), first)
    expected = DISTANCES["l2"](schedule.diffuse(z_t, 0.5 * z_t, first), goal)
    found = wrong.with_network("target", models.teacher.network).loss(objective, batch, rng)
    torch.testing.assert_close(found, expected)


def test_at_an_edge_the_goal_is_the_teachers_own_step() -> None:
    """The map from an edge to itself is the identity for any network, so that no phase learns from another."""
    schedule, rng, batch = vp_schedule(SD15), Rng(0, 0, range(400)), gaussian_batch(400)
    objective = PhasedConsistency(phases="4", guidance="free", distance="l2")
    models = oracle_models(schedule, NULL)
    state = objective.teacher_step(models.teacher, schedule, batch, rng)
    at_edge = state.s == state.end
    assert 10 < at_edge.sum() < 100

    def network(factor: float) -> Any:
        def epsilon(z: Tensor, t: Tensor, c: Any, w: Tensor | None) -> Any:
            eps = factor * z.tanh()
            return (z - schedule.sigma(t) * eps) / schedule.alpha(t), eps

        return epsilon

    losses = [objective.loss(network(1.0), network(factor), schedule, batch, state) for factor in (0.5, 2.0)]
    torch.testing.assert_close(losses[0][at_edge], losses[1][at_edge])
    assert not torch.isclose(losses[0], losses[1])[~at_edge].any()


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_an_exact_student_lands_on_every_edge_with_diffusers_own_sampler(phases: int) -> None:
    schedule, batch, objective = vp_schedule(SD15), gaussian_batch(8), PhasedConsistency(phases=str(phases))
    gaussian, scheduler = Gaussian(prompt_mean(batch.cond)), sampler(objective, phases)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    z, edges = noise, phase_edges(1000, phases)
    for t, e in zip(edges[1:].flip(0), edges[:-1].flip(0), strict=True):
        t, e = t.expand(8), e.expand(8)
        ratio = schedule.alpha(e) / schedule.alpha(t)
        at_edge = gaussian.flow(schedule, z, t, e)
        eps = (at_edge - ratio * z) / (schedule.sigma(e) - ratio * schedule.sigma(t))
        z, x0 = scheduler.step(eps, int(t[0]), z, return_dict=False)
        if e[0] > 0:
            whole_way = gaussian.flow(schedule, noise, edges[-1:].expand(8), e)
            torch.testing.assert_close(z, whole_way, rtol=1e-4, atol=1e-4)
        else:  # the sampler ends at sigma = 0, where z is x0
            torch.testing.assert_close(z, x0)
            torch.testing.assert_close(schedule.diffuse(x0, eps, e), at_edge, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_on_flow_an_exact_student_lands_on_every_edge_with_diffusers_own_sampler(phases: int) -> None:
    schedule, batch, objective = FlowSchedule(shift=3.0), gaussian_batch(8), PhasedConsistency(phases=str(phases))
    info = objective.info.on_flow()
    scheduler: Any = getattr(diffusers, info.scheduler)(shift=3.0, **info.scheduler_options(objective, 1000))
    scheduler.set_timesteps(sigmas=sampled_sigmas(phases))
    gaussian = Gaussian(prompt_mean(batch.cond))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    z, edges = noise, schedule.grid(1000)[phase_edges(1000, phases)]
    for step, (t, e) in enumerate(zip(edges[1:].flip(0), edges[:-1].flip(0), strict=True)):
        assert scheduler.timesteps[step].item() == pytest.approx(t.item(), rel=1e-5)
        end = gaussian.flow(schedule, z, t.expand(8), e.expand(8))
        velocity = (end - z) / (schedule.sigma(e[None]) - schedule.sigma(t[None]))
        z = scheduler.step(velocity, scheduler.timesteps[step], z).prev_sample
        torch.testing.assert_close(
            z, gaussian.flow(schedule, noise, edges[-1:].expand(8), e.expand(8)), rtol=1e-4, atol=1e-4
        )


def test_guidance_is_baked_or_free() -> None:
    assert PhasedConsistency().omega == "baked"
    assert PhasedConsistency(guidance="free").omega == "none"
    assert isinstance(DDIMScheduler.from_config(sampler(PhasedConsistency(), 4).config), DDIMScheduler)
