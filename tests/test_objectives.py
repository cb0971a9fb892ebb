"""Objectives: exact on the Gaussian oracle to the solver's order, and equal to a plain Algorithm 1."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import oracle_models, scaled, slope, smooth_schedule
from test_solvers import ORDER
from torch import Tensor

from lcmdistill.batch import Batch, Conditioning, Models, Network, RawNetwork, Rng, x0_eps_network
from lcmdistill.consistency import OMEGA_DIM, omega_embedding
from lcmdistill.distances import DISTANCES
from lcmdistill.objectives import OBJECTIVES, LatentConsistency, draw_times
from lcmdistill.prediction import X0Eps
from lcmdistill.schedule import NoiseSchedule, vp_schedule
from lcmdistill.solvers import SOLVERS

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NULL = Conditioning({"prompt_embeds": torch.full((1, 3, 2), -0.2)})


def gaussian_batch(size: int, std: float = 0.5) -> Batch:
    """Data N(mean of the prompt, std^2), as the oracle's teacher believes it to be."""
    g = torch.Generator().manual_seed(0)
    means = torch.linspace(-1, 1, size).view(-1, 1, 1)
    latents = means[..., None] + std * torch.randn(size, 2, 4, 4, generator=g)
    return Batch(latents, Conditioning({"prompt_embeds": means.expand(-1, 3, 2).clone()}))


# -- the oracle ------------------------------------------------------------------------------------------------------

SKIPS = [8, 16, 32, 64]


def rms_residuals(objective: str, models: Models, **fields: Any) -> list[float]:
    """The root of the mean l2 loss for each skip."""
    batch, rng = gaussian_batch(768), Rng(seed=0, step=0, places=range(768))
    losses = [OBJECTIVES[objective](skip=k, distance="l2", **fields).loss(models, batch, rng) for k in SKIPS]
    return [loss.mean().sqrt().item() for loss in losses]


@pytest.mark.parametrize("times", ["grid", "all"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_at_the_true_consistency_function_falls_with_the_skip(objective: str, solver: str, times: str) -> None:
    models = oracle_models(smooth_schedule(1024), NULL)
    residuals = rms_residuals(objective, models, solver=solver, times=times)
    # one step of a solver of order p errs by O(k^(p + 1)); the times that are drawn shift a little with k
    assert slope(SKIPS, residuals) == pytest.approx(ORDER[solver] + 1, abs=0.25)
    assert residuals[0] < 0.01


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_vanishes_for_small_skips_on_stable_diffusions_own_schedule(objective: str, solver: str) -> None:
    models = oracle_models(vp_schedule(SD15), NULL)
    residuals = rms_residuals(objective, models, solver=solver)
    assert residuals == sorted(residuals)
    assert residuals[0] < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_consistency_function_without_the_guidance_is_found_out(objective: str) -> None:
    """It follows another PF-ODE than the teacher's steps, so its loss falls an order slower."""
    models = oracle_models(smooth_schedule(1024), NULL, omega=False)
    residuals = rms_residuals(objective, models)
    assert slope(SKIPS, residuals) == pytest.approx(1, abs=0.3)
    assert residuals[0] > 10 * rms_residuals(objective, oracle_models(smooth_schedule(1024), NULL))[0]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_the_student_only(objective: str, distance: Any) -> None:
    exact = oracle_models(smooth_schedule(1000), NULL)
    factors = {role: torch.tensor([1.1], requires_grad=True) for role in ("teacher", "student", "target")}
    models = replace(exact, **{role: scaled(getattr(exact, role), factor) for role, factor in factors.items()})
    loss = OBJECTIVES[objective](distance=distance).loss(models, gaussian_batch(8), Rng(0, 0, range(8)))
    assert loss.shape == (8,)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    gradient = factors["student"].grad
    assert gradient is not None
    assert gradient.abs().item() > 1e-3
    assert factors["teacher"].grad is None
    assert factors["target"].grad is None


# -- times and omega -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "expected"), [("grid", {4, 9, 14, 19}), ("all", set(range(5, 22)))], ids=["grid", "all"]
)
def test_times_cover_what_they_should(times: str, expected: set[int]) -> None:
    t, s = draw_times(22, 5, times, Rng(seed=0, step=0, places=range(400)))
    assert set(t.tolist()) == expected
    assert t.bincount()[t.bincount() > 0].min() > 400 / len(expected) / 3
    assert s.tolist() == [max(i - 5, 0) for i in t.tolist()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_networks_are_asked_at_the_right_times_and_omega(objective: str) -> None:
    exact = oracle_models(smooth_schedule(1000), NULL)
    asked: dict[str, tuple[Tensor, Tensor | None]] = {}

    def spy(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            asked[role] = (t, w)
            return getattr(exact, role)(z, t, c, w)

        return network

    models = replace(exact, **{role: spy(role) for role in ("teacher", "student", "target")})
    OBJECTIVES[objective](skip=50, w_min=3.0, w_max=4.0).loss(models, gaussian_batch(64), Rng(0, 0, range(64)))
    (t, w), (s, target_w), (teacher_t, teacher_w) = (asked[role] for role in ("student", "target", "teacher"))
    assert torch.equal(t, draw_times(1000, 50, "grid", Rng(0, 0, range(64)))[0])
    assert torch.equal(s, (t - 50).clamp(min=0))
    assert torch.equal(teacher_t, torch.cat([t, t]))  # with the prompt and without, in one forward
    assert teacher_w is None
    assert w is not None
    assert w is target_w
    assert len(w.unique()) == 64
    assert 3.0 <= w.min() < 3.1 < 3.9 < w.max() <= 4.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_named_solver_takes_the_step(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM and Euler agree on a VP schedule, so that their losses cannot tell which of them ran."""
    exact = oracle_models(smooth_schedule(1000), NULL)
    batch, rng = gaussian_batch(8), Rng(0, 0, range(8))
    monkeypatch.setitem(SOLVERS, "nowhere", lambda denoiser, schedule, z, t, s: z)
    lost, found = (OBJECTIVES[objective](solver=name).loss(exact, batch, rng) for name in ("nowhere", "euler"))
    assert (lost > 3 * found).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip": 0}, "skip"),
        ({"skip": 1000}, "from 1 to 999"),
        ({"skip": 30}, r"does not divide T = 1000, so that t = 999,.* is never trained; try 25 or 40, or"),
        ({"skip": 700}, "; try 500, or"),
        ({"w_min": -0.5}, "w_min is -0.5; omega, which is guidance_scale - 1, must be at least 0"),
        ({"w_min": 9.0, "w_max": 8.0}, "w_min"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"solver": "magic"}, "ddim"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentConsistency(**fields).check(1000)


@pytest.mark.parametrize("skip", [30, 999])
def test_drawn_from_every_time_any_skip_is_possible(skip: int) -> None:
    LatentConsistency(skip=skip, times="all").check(1000)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_defaults_are_possible(objective: str) -> None:
    assert OBJECTIVES[objective]().check(1000) is None


# -- parity with the paper -------------------------------------------------------------------------------------------


def conv_network(seed: int, channels: int = 4, width: int = 2) -> RawNetwork:
    """A small random network of z, t, c and, if it is given one, w."""
    g = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / math.prod(shape[1:]) ** 0.5

    first, last = weights(8, channels, 3, 3), weights(channels, 8, 3, 3)
    of_prompt, of_omega, of_time = weights(8, width), weights(8, OMEGA_DIM), weights(8, 1)

    def raw(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        told = c["prompt_embeds"].mean(1) @ of_prompt.T + (t[:, None] / 100) @ of_time.T
        if w is not None:
            told = told + omega_embedding(w) @ of_omega.T
        hidden = torch.conv2d(z, first, padding=1) + told[:, :, None, None]
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
        prompt = batch.cond.rows(i, i + 1)
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


def random_models(schedule: NoiseSchedule, kind: str, raw: dict[str, RawNetwork]) -> Models:
    networks = {role: x0_eps_network(network, schedule, kind) for role, network in raw.items()}
    return Models(schedule=schedule, null=NULL, **networks)


RAW = {role: conv_network(seed) for seed, role in enumerate(("teacher", "student", "target"))}
PARITY_BATCH = replace(gaussian_batch(16), latents=torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(9)))
PARITY_RNG = Rng(seed=5, step=36, places=range(16))  # a step whose times on the grid include both its ends


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("times", ["grid", "all"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_equals_algorithm_1(kind: str, times: Any, distance: Any) -> None:
    schedule = vp_schedule(SD15)
    objective = LatentConsistency(skip=20, times=times, distance=distance, w_min=2.0, w_max=14.0)
    loss = objective.loss(random_models(schedule, kind, RAW), PARITY_BATCH, PARITY_RNG)
    t, _ = draw_times(1000, 20, times, PARITY_RNG)
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
@pytest.mark.parametrize("objective", OBJECTIVES)
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
        OBJECTIVES[objective](solver=solver).loss(random_models(schedule, kind, raw), PARITY_BATCH, PARITY_RNG)
        for kind, raw in (("epsilon", RAW), ("v_prediction", of_v))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
