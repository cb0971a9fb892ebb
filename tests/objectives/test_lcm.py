"""Objectives: exact on the Gaussian oracle to the solver's order, and equal to a plain Algorithm 1."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.consistency import OMEGA_DIM, omega_embedding
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, vp_schedule
from lcmdistill.diffusion.types import Batch, Conditioning, RawNetwork, TeacherNetwork, x0_eps_network
from lcmdistill.objectives import OBJECTIVES, common
from lcmdistill.objectives.common import sample_times
from lcmdistill.objectives.lcm import LatentConsistency
from tests.support.objectives import NULL, SD15, each_objective, gaussian_batch, made
from tests.support.oracle import Networks, oracle_models


def test_lpips_is_loaded_from_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def norm(weights: str, device: torch.device) -> Any:
        asked.append(weights)
        return lambda a, b: (a - b).flatten(1).norm(dim=1)

    monkeypatch.setattr(common, "perceptual_distance", norm)
    models = oracle_models(KarrasSchedule(), NULL)
    objective = OBJECTIVES["cd"](distance="lpips", lpips_weights="somewhere")
    plain = models.loss(OBJECTIVES["cd"](distance="l2"), gaussian_batch(4), Rng(0, 0, range(4)))
    found = models.loss(objective, gaussian_batch(4), Rng(0, 0, range(4)))
    torch.testing.assert_close(found, (32 * plain).sqrt())  # 2 channels of 4 x 4
    assert asked == ["somewhere"]


def conv_network(seed: int, channels: int = 4, width: int = 2) -> RawNetwork:
    """A small random network of z, t, c and, if it is given one, w."""
    g = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / math.prod(shape[1:]) ** 0.5

    first, last = weights(8, channels, 3, 3), weights(channels, 8, 3, 3)
    of_prompt, of_omega, of_time = weights(8, width), weights(8, OMEGA_DIM), weights(8, 1)

    def raw(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        embedding = c["prompt_embeds"].mean(1) @ of_prompt.T + (t[:, None] / 100) @ of_time.T
        if w is not None:
            embedding = embedding + omega_embedding(w) @ of_omega.T
        hidden = torch.conv2d(z, first, padding=1) + embedding[:, :, None, None]
        return torch.conv2d(hidden.sin(), last, padding=1)

    return raw


def algorithm_1(
    raw: dict[str, RawNetwork],
    kind: str,
    abar: list[float],
    batch: Batch,
    drawn: dict[str, Tensor],
    k: int,
    huber: bool,
) -> list[float]:
    """Algorithm 1 of Luo et al. 2023, sample by sample, in the paper's own form: increments Psi, guided by Eq. 14."""

    def clean_and_noise(role: str, z: Tensor, time: int, c: Conditioning, w: float | None) -> tuple[Tensor, Tensor]:
        out = raw[role](z, torch.tensor([time]), c, None if w is None else torch.tensor([w]))
        a, b = math.sqrt(abar[time]), math.sqrt(1 - abar[time])
        if kind == "epsilon":
            return (z - b * out) / a, out
        return a * z - b * out, a * out + b * z

    def f(role: str, z: Tensor, time: int, c: Conditioning, w: float) -> Tensor:
        clean, _ = clean_and_noise(role, z, time, c, w)
        denominator = (10 * time) ** 2 + 0.25
        return 0.25 / denominator * z + 10 * time / math.sqrt(denominator) * clean

    losses = []
    for i in range(len(batch.latents)):
        t = int(drawn["t"][i])
        s = t - k if t > k else 0
        w = float(drawn["w"][i])
        prompt = Conditioning({k: v[i : i + 1] for k, v in batch.cond.values.items()})
        x, noise = batch.latents[i : i + 1], drawn["noise"][i : i + 1]
        a_t, b_t = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        a_s, b_s = math.sqrt(abar[s]), math.sqrt(1 - abar[s])
        z_t = a_t * x + b_t * noise
        increments = []
        for c in (prompt, NULL):
            clean, eps = clean_and_noise("teacher", z_t, t, c, None)
            increments.append(a_s * clean + b_s * eps - z_t)
        z_s = z_t + (1 + w) * increments[0] - w * increments[1]
        difference = f("student", z_t, t, prompt, w) - f("target", z_s, s, prompt, w)
        elements = [math.sqrt(d * d + 1e-6) - 1e-3 if huber else d * d for d in difference.flatten().tolist()]
        losses.append(sum(elements) / len(elements))
    return losses


def random_models(schedule: NoiseSchedule, kind: str, raw: dict[str, RawNetwork]) -> Networks:
    teacher, student, target = (x0_eps_network(raw[role], schedule, kind) for role in ("teacher", "student", "target"))
    return Networks(schedule, TeacherNetwork(teacher, NULL), student, target)


RAW = {role: conv_network(seed) for seed, role in enumerate(("teacher", "student", "target"))}

PARITY_BATCH = replace(gaussian_batch(16), latents=torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(9)))

PARITY_RNG = Rng(seed=5, step=36, places=range(16))  # a step whose times on the grid include both its ends


@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("times", ["grid", "all"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_equals_algorithm_1(kind: str, times: Any, distance: Any) -> None:
    schedule = vp_schedule(SD15)
    objective = LatentConsistency(skip=20, times=times, distance=distance, w_min=2.0, w_max=14.0)
    loss = random_models(schedule, kind, RAW).loss(objective, PARITY_BATCH, PARITY_RNG)
    t, _ = sample_times(schedule, 20, times, PARITY_RNG)
    assert times == "all" or {19, 999} <= set(t.tolist())
    drawn = {
        "t": t,
        "noise": PARITY_RNG.normal("noise", (4, 8, 8)),
        "w": 2.0 + 12.0 * PARITY_RNG.uniform("omega"),
    }
    abar = schedule.alphas_cumprod.tolist()
    expected = algorithm_1(RAW, kind, abar, PARITY_BATCH, drawn, k=20, huber=distance == "huber")
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@each_objective
def test_a_v_teacher_trains_like_the_epsilon_teacher_it_was_converted_from(objective: str, solver: str) -> None:
    schedule = vp_schedule(SD15)

    def as_v(raw: RawNetwork) -> RawNetwork:
        """v = alpha eps - sigma x0 of an epsilon network, in float64: (eps - sigma z) / alpha."""

        def converted(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
            abar = schedule.alpha(t).double() ** 2
            return ((raw(z, t, c, w).double() - (1 - abar).sqrt() * z) / abar.sqrt()).float()

        return converted

    of_v = {role: as_v(network) for role, network in RAW.items()}
    losses = [
        random_models(schedule, kind, raw).loss(made(objective, solver=solver), PARITY_BATCH, PARITY_RNG)
        for kind, raw in (("epsilon", RAW), ("v_prediction", of_v))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
