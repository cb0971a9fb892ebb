"""TDM: the step written out, what the critic converges to, and no gradient where the student is the teacher."""

import math
import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.flow import FlowSchedule, sampled_sigmas, shifted
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import phase_edges, vp_schedule
from lcmdistill.diffusion.types import Conditioning, Network, TeacherNetwork
from lcmdistill.objectives.base import step_cost
from lcmdistill.objectives.tdm import TrajectoryDistributionMatching as Tdm
from lcmdistill.teachers.schedulers import vp_scheduler
from tests.support.objectives import NULL, SD15
from tests.support.oracle import Gaussian, prompt_mean

SCHEDULE = vp_schedule(SD15)

SEGMENTS = [1, 2, 4, 8]


def prompts(size: int) -> Conditioning:
    return Conditioning({"prompt_embeds": torch.linspace(-1, 1, size).view(-1, 1, 1).expand(-1, 3, 2).clone()})


def guided_mean(c: Conditioning, w: float) -> Tensor:
    return prompt_mean(c) + w * (prompt_mean(c) - prompt_mean(NULL))


def teacher_of(std: float = 0.5) -> TeacherNetwork:
    return TeacherNetwork(lambda z, t, c, w: Gaussian(prompt_mean(c), std).denoise(SCHEDULE, z, t), NULL)


def along_the_ode(objective: Tdm) -> Network:
    """The student whose trajectories are those of the guided teacher: it leads from each segment's start to its end."""
    edges = phase_edges(1000, objective.segments)

    def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        mid = edges[torch.searchsorted(edges, t.contiguous()) - 1]
        end = Gaussian(guided_mean(c, objective.w_min)).flow(SCHEDULE, z, t, mid)
        (a, s), (a_mid, s_mid) = ((SCHEDULE.alpha(time), SCHEDULE.sigma(time)) for time in (t, mid))
        x0 = (s * end - s_mid * z) / (s * a_mid - s_mid * a)
        return X0Eps(x0, (z - a * x0) / s)

    return student


def guided_critic(objective: Tdm) -> Network:
    """The exact score of that student's trajectories: it is the guided teacher's."""
    return lambda z, t, c, w: Gaussian(guided_mean(c, objective.w_min)).denoise(SCHEDULE, z, t)


def starts(objective: Tdm, cond: Conditioning, side: int = 2) -> Tensor:
    """Samples of the guided teacher's marginal at the last time step."""
    t = torch.full((len(cond["prompt_embeds"]),), 999)
    gaussian = Gaussian(guided_mean(cond, objective.w_min))
    u = torch.randn(len(t), 1, side, side, generator=torch.Generator().manual_seed(0))
    return SCHEDULE.alpha(t) * gaussian.mean + gaussian.variance(SCHEDULE, t).sqrt() * u


@pytest.mark.parametrize("segments", SEGMENTS)
def test_the_rollout_is_the_samplers_trajectory(segments: int) -> None:
    objective, cond = Tdm(segments=segments), prompts(3)
    visited: list[int] = []

    def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        visited.append(int(t[0]))
        return teacher_of().network(z, t, c, w)

    z = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    rollout = objective.rollout(student, SCHEDULE, cond, z)
    config = {**SD15, "num_train_timesteps": 1000}
    scheduler: Any = vp_scheduler(config, objective.info.scheduler, objective.info.scheduler_options(objective, 1000))
    scheduler.set_timesteps(segments)
    assert scheduler.timesteps.tolist() == visited
    for step, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(rollout.z[segments - 1 - step], z, rtol=1e-3, atol=1e-3)
        eps = teacher_of().network(z, t.expand(3), cond, None).eps
        z = scheduler.step(eps, t, z).prev_sample
    torch.testing.assert_close(rollout.x0[0], z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_on_flow_the_rollout_is_the_samplers_trajectory(segments: int) -> None:
    objective, cond, schedule = Tdm(segments=segments), prompts(3), FlowSchedule(shift=3.0)
    visited: list[float] = []

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        return Gaussian(prompt_mean(c), 0.5).denoise(schedule, z, t)

    def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        visited.append(float(t[0]))
        return network(z, t, c, w)

    z = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    rollout = objective.rollout(student, schedule, cond, z)
    scheduler: Any = getattr(diffusers, objective.info.on_flow().scheduler)(shift=3.0)
    scheduler.set_timesteps(sigmas=sampled_sigmas(segments))
    assert visited == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)
    for step, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(rollout.z[segments - 1 - step], z, rtol=1e-4, atol=1e-4)
        x0, eps = network(z, t.expand(3), cond, None)
        z = scheduler.step(eps - x0, t, z).prev_sample
    torch.testing.assert_close(rollout.x0[0], z, rtol=1e-4, atol=1e-4)
    draw = objective.sample("student", schedule, rollout, Rng(0, 0, range(3)))
    assert (
        (draw.mid < draw.tau) & (draw.tau < draw.start) & (draw.tau >= 1000 * shifted(torch.tensor(0.021), 3.0))
    ).all()


@pytest.mark.parametrize("segments", SEGMENTS)
def test_draws_stay_within_their_segment(segments: int) -> None:
    objective, edges = Tdm(segments=segments), phase_edges(1000, segments)
    rollout = objective.rollout(teacher_of().network, SCHEDULE, prompts(400), torch.zeros(400, 1, 1, 1))
    draw = objective.sample("student", SCHEDULE, rollout, Rng(0, 0, range(400)))
    assert set(draw.segment.tolist()) == set(range(segments))
    assert torch.equal(draw.start, edges[draw.segment + 1])
    assert torch.equal(draw.mid, edges[draw.segment])
    assert (draw.tau >= draw.mid.clamp(min=20)).all()
    assert (draw.tau < draw.start - 10).all()
    span = (draw.tau - draw.mid.clamp(min=20)) / (draw.start - 10 - draw.mid.clamp(min=20))
    assert span.mean() == pytest.approx(0.5, abs=0.05)
    other = objective.sample("critic-0", SCHEDULE, rollout, Rng(0, 0, range(400)))
    assert not torch.equal(other.tau, draw.tau)


@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_there_is_no_gradient_where_student_and_critic_are_exact(segments: int, distance: Any) -> None:
    """The student's trajectories are the guided teacher's, and the critic is their score: both terms cancel per sample."""
    objective, cond = Tdm(segments=segments, distance=distance), prompts(64)
    shift = torch.zeros(1, requires_grad=True)
    exact = along_the_ode(objective)

    def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        x0, eps = exact(z, t, c, w)
        return X0Eps(x0 + shift, eps)

    with torch.no_grad():
        rollout = objective.rollout(exact, SCHEDULE, cond, starts(objective, cond))
    found = objective.student_loss(
        student, guided_critic(objective), teacher_of(), SCHEDULE, cond, rollout, Rng(0, 0, range(64))
    )
    found.loss.mean().backward()
    assert shift.grad is not None
    assert found.loss.abs().max() < 1e-3
    # Of a pseudo-Huber loss the gradient is d / c where d is far below c: fp32 leaves d of some 1e-6.
    assert shift.grad.abs().item() < (1e-2 if distance == "huber" else 1e-5)


def recording_student(outputs: list[Tensor]) -> Network:
    """A student that is wrong, and that adds each x0 that it predicts to a list, as a leaf."""

    def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        x0, eps = Gaussian(0.3, 0.7).denoise(SCHEDULE, z, t)
        outputs.append(x0.detach().requires_grad_())
        return X0Eps(outputs[-1], eps)

    return student


def critic(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
    """The score of another distribution than the student's."""
    return Gaussian(0.3, 0.9).denoise(SCHEDULE, z, t)


def test_the_gradient_is_the_analytic_one() -> None:
    """d/dx0 of l2(x0, sg[x0 + g]) / W is -2 g / (W n), with g the guided teacher's estimate minus the critic's."""
    objective, cond, rng = Tdm(segments=2, distance="l2", w_min=3.0, w_max=3.0), prompts(6), Rng(3, 5, range(6))
    outputs: list[Tensor] = []
    student = recording_student(outputs)
    rollout = objective.rollout(student, SCHEDULE, cond, torch.randn(6, 1, 2, 2))
    found = objective.student_loss(student, critic, teacher_of(), SCHEDULE, cond, rollout, rng)
    found.loss.sum().backward()
    x0 = outputs[-1]
    draw = objective.sample("student", SCHEDULE, rollout, rng)
    z = rollout.z[draw.segment, torch.arange(6)]
    eps = Gaussian(0.3, 0.7).denoise(SCHEDULE, z, draw.start).eps
    a, s, a_mid, s_mid = (f(t) for t in (draw.tau, draw.mid) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    k = a / a_mid
    z_tau = k * (a_mid * x0.detach() + s_mid * eps) + (s**2 - (k * s_mid) ** 2).sqrt() * draw.noise
    real = Gaussian(guided_mean(cond, 3.0)).denoise(SCHEDULE, z_tau, draw.tau).x0
    fake = Gaussian(0.3, 0.9).denoise(SCHEDULE, z_tau, draw.tau).x0
    scale = (x0.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x0.grad, -2 * (real - fake) / (scale * 4), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.numbers["teacher_gap"], scale.flatten(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tau, draw.tau / 1000)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_decoupled_terms_have_noise_levels_of_their_own(segments: int) -> None:
    objective = Tdm(segments=segments, decoupled=True)
    rollout = objective.rollout(teacher_of().network, SCHEDULE, prompts(400), torch.zeros(400, 1, 1, 1))
    draw = objective.sample("student", SCHEDULE, rollout, Rng(0, 0, range(400)))
    low = draw.mid.clamp(min=20)
    for tau, noisiest in ((draw.tau, torch.full_like(draw.start, 999)), (draw.guidance_tau, draw.start)):
        assert ((low <= tau) & (tau < noisiest - 10)).all()
        assert ((tau - low) / (noisiest - 10 - low)).mean() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(draw.noise, draw.guidance_noise)
    coupled = Tdm(segments=segments).sample("student", SCHEDULE, rollout, Rng(0, 0, range(400)))
    assert torch.equal(coupled.tau, coupled.guidance_tau)
    assert torch.equal(coupled.noise, coupled.guidance_noise)


def test_the_gradient_of_decoupled_terms_is_the_analytic_one() -> None:
    """d/dx0 of l2(x0, sg[x0 + g]) is -2 g / n, with g the sum of both terms, each divided by its mean size or by 0.1."""
    objective = Tdm(segments=2, distance="l2", w_min=3.0, w_max=3.0, decoupled=True)
    cond, rng = prompts(6), Rng(3, 5, range(6))
    outputs: list[Tensor] = []
    student = recording_student(outputs)
    rollout = objective.rollout(student, SCHEDULE, cond, torch.randn(6, 1, 2, 2))
    objective.student_loss(student, critic, teacher_of(), SCHEDULE, cond, rollout, rng).loss.sum().backward()
    x0, draw = outputs[-1], objective.sample("student", SCHEDULE, rollout, rng)
    eps = Gaussian(0.3, 0.7).denoise(SCHEDULE, rollout.z[draw.segment, torch.arange(6)], draw.start).eps

    def noised(tau: Tensor, noise: Tensor) -> Tensor:
        a, s, a_mid, s_mid = (f(t) for t in (tau, draw.mid) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        k = a / a_mid
        return k * (a_mid * x0.detach() + s_mid * eps) + (s**2 - (k * s_mid) ** 2).sqrt() * noise

    def estimate(mean: Tensor, std: float, tau: Tensor, noise: Tensor) -> Tensor:
        return Gaussian(mean, std).denoise(SCHEDULE, noised(tau, noise), tau).x0

    matching = estimate(prompt_mean(cond), 0.5, draw.tau, draw.noise)
    matching = matching - estimate(torch.tensor(0.3), 0.9, draw.tau, draw.noise)
    at_guidance = (draw.guidance_tau, draw.guidance_noise)
    guidance = estimate(prompt_mean(cond), 0.5, *at_guidance) - estimate(prompt_mean(NULL), 0.5, *at_guidance)
    sizes = [value.abs().mean((1, 2, 3), keepdim=True) for value in (matching, 3 * guidance)]
    assert min(size.min() for size in sizes) < 0.1 < min(size.max() for size in sizes)
    terms = matching / sizes[0].clamp(min=0.1) + 3 * guidance / sizes[1].clamp(min=0.1)
    torch.testing.assert_close(x0.grad, -2 * terms / 4, rtol=1e-3, atol=1e-5)


def bias_of_the_critic(segments: int, target: Any, size: int = 500) -> float:
    """The slope of the critic's loss at the exact score of exact trajectories, in deviations of its own noise."""
    objective = Tdm(segments=segments, critic_target=target, w_min=0.0, w_max=0.0)
    cond = Conditioning({"prompt_embeds": torch.zeros(size, 3, 2)})
    rollout = objective.rollout(along_the_ode(objective), SCHEDULE, cond, starts(objective, cond, side=16))
    factor = torch.ones(size, 1, 1, 1, requires_grad=True)
    exact = guided_critic(objective)

    def critic(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        eps = exact(z, t, c, w).eps * factor
        return X0Eps((z - SCHEDULE.sigma(t) * eps) / SCHEDULE.alpha(t), eps)

    objective.critic_loss(critic, SCHEDULE, cond, rollout, Rng(0, 0, range(size))).sum().backward()
    assert factor.grad is not None
    slopes = factor.grad.flatten()
    return abs(slopes.mean() / slopes.std() * math.sqrt(size)).item()


@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_critic_that_predicts_the_added_noise_learns_the_score(segments: int) -> None:
    assert bias_of_the_critic(segments, "score") < 4


@pytest.mark.parametrize("segments", [2, 4])
def test_the_published_critic_learns_something_else_than_the_score(segments: int) -> None:
    """It learns E[x0 | z_tau]: the score only if what is left of the noise at z_mid does not depend on x0.

    On a deterministic trajectory it does, the more the noisier z_mid is.
    """
    assert bias_of_the_critic(segments, "x0") > 8


@pytest.mark.parametrize("fields", [{}, {"segments": 1}, {"segments": 8, "critic_steps": 3}, {"decoupled": True}])
def test_declared_forwards_are_those_that_are_counted(fields: dict[str, Any]) -> None:
    objective, counts = Tdm(**fields), {"teacher": 0, "student": 0, "critic": 0}

    def counting(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            counts[role] += len(z)
            return X0Eps(z, z)

        return network

    networks: dict[str, Network] = {role: counting(role) for role in counts}
    cond, rng = prompts(1), Rng(0, 0, [0])
    rollout = objective.rollout(networks["student"], SCHEDULE, cond, torch.zeros(1, 1, 2, 2))
    for draw in range(objective.critic_steps):
        objective.critic_loss(networks["critic"], SCHEDULE, cond, rollout, rng, draw)
    teacher = TeacherNetwork(networks["teacher"], NULL)
    objective.student_loss(networks["student"], networks["critic"], teacher, SCHEDULE, cond, rollout, rng)
    assert counts == objective.num_forwards
    # 13 forwards' worth by default: 4 for the rollout, 3 for the critic, 6 for the student
    assert step_cost(objective) == sum(counts.values()) + 2 + 2 * objective.critic_steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segments": 0}, "segments is 0; it must be from 1 to 31"),
        ({"segments": 32}, "longer than objective.tau_min"),
        ({"tau_min": 0}, "tau_min is 0"),
        ({"tau_margin": -1}, "tau_margin -1"),
        ({"critic_steps": 0}, "critic_steps is 0; it must be at least 1"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate is -1"),
        ({"critic_rank": 0}, "critic_rank is 0"),
        ({"snr_clip": 0.0}, "snr_clip is 0; it must be above 0"),
        ({"w_min": 3.0, "w_max": 2.0}, "w_min is 3"),
        ({"ema_decay": 1.0}, "ema_decay is 1"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Tdm(**fields).check(1000)


def test_the_largest_number_of_segments_still_has_times_in_each() -> None:
    objective = Tdm(segments=31)
    objective.check(1000)
    rollout = objective.rollout(teacher_of().network, SCHEDULE, prompts(50), torch.zeros(50, 1, 1, 1))
    draw = objective.sample("student", SCHEDULE, rollout, Rng(0, 0, range(50)))
    assert ((draw.mid <= draw.tau) & (draw.tau < draw.start)).all()
