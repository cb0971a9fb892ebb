"""Objectives: exact on the Gaussian oracle to the solver's order, and equal to a plain Algorithm 1."""

import dataclasses
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import oracle_models, scaled, slope, smooth_schedule
from test_solvers import ORDER
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lcmdistill.diffusion.consistency import OMEGA_DIM, omega_embedding
from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, VPSchedule, vp_schedule
from lcmdistill.diffusion.solvers import SOLVERS
from lcmdistill.diffusion.types import Batch, Conditioning, Models, Network, RawNetwork, x0_eps_network
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.base import forwards
from lcmdistill.objectives.common import draw_times, draw_up_to
from lcmdistill.objectives.ct import ConsistencyTraining, ImprovedConsistencyTraining
from lcmdistill.objectives.lcm import LatentConsistency

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NULL = Conditioning({"prompt_embeds": torch.full((1, 3, 2), -0.2)})


def gaussian_batch(size: int, std: float = 0.5) -> Batch:
    """Data N(mean of the prompt, std^2), as the oracle's teacher believes it to be."""
    g = torch.Generator().manual_seed(0)
    means = torch.linspace(-1, 1, size).view(-1, 1, 1)
    latents = means[..., None] + std * torch.randn(size, 2, 4, 4, generator=g)
    return Batch(latents, Conditioning({"prompt_embeds": means.expand(-1, 3, 2).clone()}))


TEACHERLESS = ("lcf", "ct", "ict")


def fields_of(objective: str) -> set[str]:
    return {field.name for field in dataclasses.fields(OBJECTIVES[objective])}


def made(objective: str, *, step: int | None = None, steps: int = 1024, **fields: Any) -> Any:
    """An objective with those of the fields that it has; `step` apart, in whichever way it says how far apart t and s are."""
    known = fields_of(objective)
    if step is not None:
        size = {"skip": step, "scales": steps // step + 1, "s0": steps // step, "s1": steps // step}
        fields = {**size, **fields}
    return OBJECTIVES[objective](**{key: value for key, value in fields.items() if key in known})


having = {
    field: pytest.mark.parametrize("objective", [name for name in OBJECTIVES if field in fields_of(name)])
    for field in ("solver", "skip", "guidance")
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)

# -- the oracle ------------------------------------------------------------------------------------------------------

SKIPS = [8, 16, 32, 64]
SCHEDULES: dict[str, NoiseSchedule] = {
    "VP": smooth_schedule(1024),
    "Karras": KarrasSchedule(num_steps=1024),
    "SD": vp_schedule({**SD15, "num_train_timesteps": 1024}),
}


def exact_models(objective: str, schedule: NoiseSchedule, rng: Rng, step: int, times: str) -> Models:
    """The oracle's networks in the form that the objective compares: TCD's go to the s' that it draws."""
    end = None
    if objective == "tcd":
        end = draw_up_to(schedule, draw_times(schedule, step, times, rng)[1], rng)
    return oracle_models(schedule, NULL, omega=objective != "lcf", end=end)


def rms_residuals(objective: str, schedule: NoiseSchedule, times: str = "grid", **fields: Any) -> list[float]:
    """The root of the mean l2 loss at the true consistency function, for each step between t and s."""
    batch, rng, found = gaussian_batch(512), Rng(seed=0, step=0, places=range(512)), []
    for step in SKIPS:
        own = made(objective, step=step, distance="l2", weighting="uniform", times=times, **fields)
        models = exact_models(objective, schedule, rng, step, times)
        found.append(own.loss(models, batch, rng).mean().sqrt().item())
    return found


@pytest.mark.parametrize("schedule", ["VP", "Karras"])
@pytest.mark.parametrize("solver", SOLVERS)
@having["solver"]
def test_loss_at_the_true_consistency_function_falls_at_the_solver_s_order(
    objective: str, solver: str, schedule: str
) -> None:
    residuals = rms_residuals(objective, SCHEDULES[schedule], solver=solver)
    # one step of a solver of order p errs by O(k^(p + 1)); the times that are drawn shift a little with k
    assert slope(SKIPS, residuals) == pytest.approx(ORDER[solver] + 1, abs=0.2)
    assert residuals[0] < 0.01


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@having["skip"]
def test_the_same_holds_for_times_drawn_from_every_step(objective: str, solver: str) -> None:
    order = 0 if objective in TEACHERLESS else ORDER[solver]
    residuals = rms_residuals(objective, SCHEDULES["VP"], "all", solver=solver)
    assert slope(SKIPS, residuals) == pytest.approx(order + 1, abs=0.25)


@pytest.mark.parametrize("schedule", ["VP", "Karras"])
@pytest.mark.parametrize("objective", TEACHERLESS)
def test_without_a_teacher_the_loss_falls_with_the_step(objective: str, schedule: str) -> None:
    """Of the same noise z_s is where the PF-ODE leads on average only, and one pair is off by O(k)."""
    times = "uniform" if "growth" in fields_of(objective) else "grid"
    residuals = rms_residuals(objective, SCHEDULES[schedule], times)
    assert slope(SKIPS, residuals) == pytest.approx(1, abs=0.1)
    assert residuals[0] < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
@each_objective
def test_loss_is_nothing_where_all_data_are_one_image(objective: str, schedule: str) -> None:
    """x0 and eps are then constant along the PF-ODE, and z_s of the same noise lies on it."""
    rng, batch = Rng(0, 0, range(32)), gaussian_batch(32, std=0.0)
    exact = exact_models(objective, SCHEDULES[schedule], rng, 32, "grid")
    models = oracle_models(SCHEDULES[schedule], NULL, std=0.0, omega=False)
    if objective == "tcd":  # whose map is then the way to every time
        models = replace(exact, **dict.fromkeys(("teacher", "student", "target"), models.teacher))
    own = made(objective, step=32, guidance="free", distance="l2", weighting="uniform")
    assert own.loss(models, batch, rng).max().item() < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@having["solver"]
def test_loss_vanishes_for_small_steps_on_stable_diffusions_own_schedule(objective: str, solver: str) -> None:
    residuals = rms_residuals(objective, SCHEDULES["SD"], solver=solver)
    assert residuals == sorted(residuals)
    assert residuals[0] < 0.02


@pytest.mark.parametrize("objective", ["lcm"])
def test_a_consistency_function_without_the_guidance_is_found_out(objective: str) -> None:
    """It follows another PF-ODE than the teacher's steps, so its loss falls an order slower."""
    batch, rng = gaussian_batch(512), Rng(0, 0, range(512))
    models = oracle_models(SCHEDULES["VP"], NULL, omega=False)
    losses = [made(objective, step=k, distance="l2").loss(models, batch, rng) for k in SKIPS]
    residuals = [loss.mean().sqrt().item() for loss in losses]
    assert slope(SKIPS, residuals) == pytest.approx(1, abs=0.3)
    assert residuals[0] > 10 * rms_residuals(objective, SCHEDULES["VP"])[0]


@pytest.mark.parametrize("objective", ["lcm", "tcd"])
def test_free_guidance_follows_the_teacher_as_it_is(objective: str) -> None:
    residuals = rms_residuals(objective, SCHEDULES["VP"], guidance="free")
    assert slope(SKIPS, residuals) == pytest.approx(2, abs=0.2)
    assert residuals[0] < rms_residuals(objective, SCHEDULES["VP"])[0]


@pytest.mark.parametrize("distance", DISTANCES)
@each_objective
def test_gradients_reach_the_student_only(objective: str, distance: Any) -> None:
    exact = oracle_models(smooth_schedule(1000), NULL)
    if objective == "tcd":
        exact = replace(exact, student=exact.teacher, target=exact.teacher)
    factors = {role: torch.tensor([1.1], requires_grad=True) for role in ("teacher", "student", "target")}
    models = replace(exact, **{role: scaled(getattr(exact, role), factor) for role, factor in factors.items()})
    loss = made(objective, distance=distance).loss(models, gaussian_batch(8), Rng(0, 0, range(8)))
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
    t, s = draw_times(smooth_schedule(22), 5, times, Rng(seed=0, step=0, places=range(400)))
    assert set(t.tolist()) == expected
    assert t.bincount()[t.bincount() > 0].min() > 400 / len(expected) / 3
    assert s.tolist() == [max(i - 5, 0) for i in t.tolist()]


@pytest.mark.parametrize("schedule", [smooth_schedule(20), KarrasSchedule(num_steps=20)], ids=["VP", "Karras"])
def test_an_end_is_any_step_up_to_s(schedule: NoiseSchedule) -> None:
    steps, rng = schedule.grid(20), Rng(0, 0, range(300))
    assert (draw_up_to(schedule, steps[:1].expand(300), rng) == steps[0]).all()
    found = draw_up_to(schedule, steps[4:5].expand(300), rng)
    assert set(found.tolist()) == set(steps[:5].tolist())
    assert min(int((found == step).sum()) for step in steps[:5]) > 300 / 5 / 2
    assert (
        draw_up_to(schedule, draw_times(schedule, 5, "all", rng)[1], rng) <= draw_times(schedule, 5, "all", rng)[1]
    ).all()


def asked_of(objective: str, schedule: NoiseSchedule, **fields: Any) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """(t, w) of every question to each network, for 64 samples."""
    exact = oracle_models(schedule, NULL)
    asked: dict[str, list[tuple[Tensor, Tensor | None]]] = {"teacher": [], "student": [], "target": []}

    def spy(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            asked[role].append((t, w))
            return exact.teacher(z, t, c, w)

        return network

    models = replace(exact, **{role: spy(role) for role in asked})
    own = made(objective, solver="ddim", w_min=3.0, w_max=4.0, **fields)
    own.loss(models, gaussian_batch(64), Rng(0, 0, range(64)))
    return asked


@having["skip"]
def test_networks_are_asked_at_the_right_times_and_omega(objective: str) -> None:
    schedule = smooth_schedule(1000)
    asked = asked_of(objective, schedule, skip=50)
    ((t, w),), ((s, target_w),) = asked["student"], asked["target"]
    assert torch.equal(t, draw_times(schedule, 50, "grid", Rng(0, 0, range(64)))[0])
    assert torch.equal(s, (t - 50).clamp(min=0))
    if objective in TEACHERLESS:
        assert asked["teacher"] == []
    else:
        ((teacher_t, teacher_w),) = asked["teacher"]
        assert torch.equal(teacher_t, torch.cat([t, t]))  # with the prompt and without, in one forward
        assert teacher_w is None
    assert w is not None
    assert w is target_w
    assert len(w.unique()) == 64
    assert 3.0 <= w.min() < 3.1 < 3.9 < w.max() <= 4.0


@having["guidance"]
def test_with_free_guidance_nobody_is_told_omega_and_the_teacher_is_asked_once(objective: str) -> None:
    asked = asked_of(objective, smooth_schedule(1000), guidance="free")
    of_teacher, (student,), (target,) = asked["teacher"], asked["student"], asked["target"]
    assert student[1] is None
    assert target[1] is None
    if objective in TEACHERLESS:
        assert of_teacher == []
    else:
        ((teacher_t, teacher_w),) = of_teacher
        assert torch.equal(teacher_t, student[0])
        assert teacher_w is None
    assert made(objective, guidance="free").omega == "none"
    assert made(objective).omega != "none"


@pytest.mark.parametrize("schedule", [smooth_schedule(1000), KarrasSchedule()], ids=["VP", "Karras"])
@pytest.mark.parametrize("objective", ["cd", "ct", "ict"])
def test_neighbours_on_the_grid_are_compared(objective: str, schedule: NoiseSchedule) -> None:
    asked = asked_of(objective, schedule, scales=18, s0=17, s1=17)
    ((t, w),), ((s, target_w),) = asked["student"], asked["target"]
    grid = schedule.grid(17 if objective == "ct" else 18)
    place = torch.searchsorted(grid, t)
    assert torch.equal(grid[place], t)
    assert torch.equal(grid[place - 1], s)
    assert len(place.unique()) > (5 if objective == "ict" else 13)
    assert w is None
    assert target_w is None
    assert [torch.equal(teacher_t, t) for teacher_t, _ in asked["teacher"]] == [True] * (objective == "cd")


@having["solver"]
def test_the_named_solver_takes_the_step(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM and Euler agree on a VP schedule, so that their losses cannot tell which of them ran."""
    schedule, rng = smooth_schedule(1000), Rng(0, 0, range(8))
    exact = exact_models(objective, schedule, rng, 20, "grid")
    monkeypatch.setitem(SOLVERS, "nowhere", lambda denoiser, schedule, z, t, s: z)
    lost, found = (made(objective, solver=name).loss(exact, gaussian_batch(8), rng) for name in ("nowhere", "euler"))
    assert (lost > 3 * found).all()


@each_objective
def test_forwards_are_counted(objective: str) -> None:
    told = {"student": 1, "target": 1} | ({} if objective in TEACHERLESS else {"teacher": 2})
    assert forwards(made(objective), vp_schedule(SD15)) == told
    with FakeTensorMode():  # of a device that need not be there
        assert forwards(made(objective), VPSchedule(torch.empty(1000, device="cuda"))) == told


def test_forwards_tell_solvers_and_guidance_apart() -> None:
    ways: list[Any] = [("ddim", "baked"), ("dpm-solver++", "baked"), ("ddim", "free"), ("heun", "free")]
    counted = [
        forwards(made("lcm", solver=solver, guidance=guidance), vp_schedule(SD15))["teacher"]
        for solver, guidance in ways
    ]
    assert counted == [2, 4, 1, 2]


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("lcm", {"skip": 0}, "skip"),
        ("lcm", {"skip": 1000}, "from 1 to 999"),
        ("lcm", {"skip": 30}, r"does not divide T = 1000, so that t = 999,.* is never trained; try 25 or 40, or"),
        ("tcd", {"skip": 700}, "; try 500, or"),
        ("lcf", {"skip": 700}, "; try 500, or"),
        ("lcm", {"w_min": -0.5}, "w_min is -0.5; omega, which is guidance_scale - 1, must be at least 0"),
        ("tcd", {"w_min": 9.0, "w_max": 8.0}, "w_min"),
        ("lcm", {"ema_decay": 1.0}, "ema_decay"),
        ("cd", {"ema_decay": -0.1}, "ema_decay"),
        ("lcm", {"solver": "magic"}, "ddim"),
        ("cd", {"solver": "magic"}, "ddim"),
        ("cd", {"scales": 1}, "at least 2 points"),
        ("cd", {"distance": "lpips"}, "needs objective.lpips_weights"),
        ("ct", {"lpips_weights": "alexnet.pth"}, "objective.distance is l2; say lpips"),
        ("ct", {"s0": 0}, "1 <= s0 <= s1"),
        ("ct", {"s0": 1}, "a first grid of one point; it must be at least 2"),
        ("ct", {"s0": 20, "s1": 10}, "1 <= s0 <= s1"),
        ("ct", {"mu0": 1.0}, "mu0 is 1.0"),
        ("ct", {"curriculum_steps": 0}, r"\(K\) is 0"),
        ("ict", {"p_std": 0.0}, "p_std"),
    ],
)
def test_impossible_fields_are_refused(objective: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[objective](**fields).check(1000)


@pytest.mark.parametrize("skip", [30, 999])
@having["skip"]
def test_drawn_from_every_time_any_skip_is_possible(objective: str, skip: int) -> None:
    made(objective, skip=skip, times="all").check(1000)


@each_objective
def test_defaults_are_possible(objective: str) -> None:
    assert OBJECTIVES[objective]().check(1000) is None


# -- curricula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "scales", "mu"), [(0, 2, 0.9025), (1, 3, 0.95), (200_000, 101, 0.998975), (800_000, 201, 0.999487)]
)
def test_golden_curriculum_of_consistency_training(step: int, scales: int, mu: float) -> None:
    objective = ConsistencyTraining(s1=200, mu0=0.95, curriculum_steps=800_000)
    assert objective.scales(step) == scales
    assert objective.mu(step) == pytest.approx(mu, rel=1e-6)


def test_a_curriculum_stays_at_its_end() -> None:
    for objective in (ConsistencyTraining(curriculum_steps=100), ImprovedConsistencyTraining(curriculum_steps=100)):
        assert objective.scales(100) == objective.scales(10**6) == objective.s1 + 1


def test_golden_curriculum_of_ict() -> None:
    """N = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2(s1 / s0) + 1)): eight grids, each for K / 8 steps."""
    objective = ImprovedConsistencyTraining(curriculum_steps=400_000)
    found = [objective.scales(50_000 * i) for i in range(8)]
    assert found == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert objective.scales(49_999) == 11
    assert objective.mu(0) == objective.mu(399_999) == 0.0


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
        ImprovedConsistencyTraining(weighting=weighting).loss(models, batch, rng)
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
    loss = objective.loss(models, gaussian_batch(32), Rng(0, 7, range(32)))
    assert objective.scales(7) == 1281
    assert loss.isfinite().all()


# -- dropout ---------------------------------------------------------------------------------------------------------


@each_objective
def test_both_networks_drop_the_same_where_the_method_says_so(objective: str) -> None:
    """Song et al. 2023: the noise of dropout is not to be told from inconsistency."""
    masks: dict[str, Tensor] = {}

    def dropping(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            masks[role] = torch.nn.functional.dropout(torch.ones_like(z), 0.5)
            return X0Eps(z, z)

        return network

    roles = ("teacher", "student", "target")
    models = Models(vp_schedule(SD15), *map(dropping, roles), null=NULL, has_dropout=True)
    state = torch.get_rng_state()
    models.seed_dropout(rng := Rng(0, 0, range(4)))
    made(objective).loss(models, gaussian_batch(4), rng)
    torch.set_rng_state(state)
    assert torch.equal(masks["student"], masks["target"]) == OBJECTIVES[objective]().same_dropout
    assert OBJECTIVES[objective]().same_dropout == (objective in ("cd", "ct", "ict"))


def test_lpips_is_the_models_own() -> None:
    models = replace(oracle_models(KarrasSchedule(), NULL), perceptual=lambda a, b: (a - b).flatten(1).norm(dim=1))
    objective = OBJECTIVES["cd"](distance="lpips", lpips_weights="somewhere")
    plain = OBJECTIVES["cd"](distance="l2").loss(models, gaussian_batch(4), Rng(0, 0, range(4)))
    found = objective.loss(models, gaussian_batch(4), Rng(0, 0, range(4)))
    torch.testing.assert_close(found, (32 * plain).sqrt())  # 2 channels of 4 x 4
    with pytest.raises(ValueError, match="its weights were not given"):
        objective.loss(replace(models, perceptual=None), gaussian_batch(4), Rng(0, 0, range(4)))


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


def random_models(schedule: NoiseSchedule, kind: str, raw: dict[str, RawNetwork]) -> Models:
    teacher, student, target = (x0_eps_network(raw[role], schedule, kind) for role in ("teacher", "student", "target"))
    return Models(schedule, teacher, student, target, NULL)


RAW = {role: conv_network(seed) for seed, role in enumerate(("teacher", "student", "target"))}
PARITY_BATCH = replace(gaussian_batch(16), latents=torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(9)))
PARITY_RNG = Rng(seed=5, step=36, places=range(16))  # a step whose times on the grid include both its ends


@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("times", ["grid", "all"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_equals_algorithm_1(kind: str, times: Any, distance: Any) -> None:
    schedule = vp_schedule(SD15)
    objective = LatentConsistency(skip=20, times=times, distance=distance, w_min=2.0, w_max=14.0)
    loss = objective.loss(random_models(schedule, kind, RAW), PARITY_BATCH, PARITY_RNG)
    t, _ = draw_times(schedule, 20, times, PARITY_RNG)
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
        made(objective, solver=solver).loss(random_models(schedule, kind, raw), PARITY_BATCH, PARITY_RNG)
        for kind, raw in (("epsilon", RAW), ("v_prediction", of_v))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
