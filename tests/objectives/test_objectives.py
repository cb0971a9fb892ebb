"""Objectives: exact on the Gaussian oracle to the solver's order, and equal to a plain Algorithm 1."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, vp_schedule
from lcmdistill.diffusion.types import Conditioning, Network
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.base import StepCounts
from lcmdistill.objectives.common import sample_end_time, sample_times
from tests.support.objectives import NULL, SD15, asked_of, each_objective, fields_of, gaussian_batch, made
from tests.support.oracle import Networks, oracle_models, scaled, slope, smooth_schedule
from tests.support.solvers import ORDER

TEACHERLESS = ("lcf", "ct", "ict", "ect")

having = {
    field: pytest.mark.parametrize("objective", [name for name in OBJECTIVES if field in fields_of(name)])
    for field in ("solver", "guidance")
}

on_a_skipping_grid = pytest.mark.parametrize(
    "objective", [name for name in OBJECTIVES if {"skip", "times"} <= fields_of(name)]
)

MAPS = ("tcd", "pcm")
"the objectives whose student predicts the way to a later time, alpha x0 + sigma eps, instead of to the first time"

BAKED: dict[str, Any] = {"pcm": {"w_min": 3.0, "w_max": 3.0}}
"one omega for the objectives whose student receives none: only then is its map exact"

SKIPS = [8, 16, 32, 64]

SCHEDULES: dict[str, NoiseSchedule] = {
    "VP": smooth_schedule(1024),
    "Karras": KarrasSchedule(num_steps=1024),
    "SD": vp_schedule({**SD15, "num_train_timesteps": 1024}),
    "flow": FlowSchedule(1024),
    "flow, shift 3": FlowSchedule(1024, shift=3.0),
}


def exact_models(
    objective: str, schedule: NoiseSchedule, rng: Rng, step: int, times: str, *, free: bool = False
) -> Networks:
    """The oracle's networks in the form that the objective compares: TCD's go to the s' that it draws, PCM's to the edge."""
    end, baked = None, 0.0 if free else BAKED.get(objective, {"w_min": 0.0})["w_min"]
    if objective == "pcm":
        end = made(objective, step=step).sample_phases(schedule, rng)[2]
    if objective == "tcd":
        end = sample_end_time(schedule, sample_times(schedule, step, times, rng)[1], rng)
    return oracle_models(schedule, NULL, omega=objective != "lcf", end=end, baked=baked)


def rms_residuals(objective: str, schedule: NoiseSchedule, times: str = "grid", **fields: Any) -> list[float]:
    """The root of the mean l2 loss at the true consistency function, for each step between t and s."""
    batch, rng, found = gaussian_batch(512), Rng(seed=0, step=0, places=range(512)), []
    for step in SKIPS:
        given = {"distance": "l2", "weighting": "uniform", "times": times, **BAKED.get(objective, {}), **fields}
        own, is_free = made(objective, step=step, **given), fields.get("guidance") == "free"
        models = exact_models(objective, schedule, rng, step, times, free=is_free)
        loss = models.loss(own, batch, rng)
        if isinstance(schedule, FlowSchedule):  # lambda is infinite at both ends of a flow, where steps are DDIM's
            t, s = own.sample_timesteps(schedule, rng)
            loss = loss[((schedule.alpha(t) > 0.1) & (schedule.sigma(s) > 0.1)).flatten()]
        found.append(loss.mean().sqrt().item())
    return found


@pytest.mark.parametrize("schedule", ["VP", "Karras", "flow"])
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
@on_a_skipping_grid
def test_the_same_holds_for_times_drawn_from_every_step(objective: str, solver: str) -> None:
    order = 0 if objective in TEACHERLESS else ORDER[solver]
    residuals = rms_residuals(objective, SCHEDULES["VP"], "all", solver=solver)
    assert slope(SKIPS, residuals) == pytest.approx(order + 1, abs=0.25)


@pytest.mark.parametrize("schedule", ["VP", "Karras", "flow", "flow, shift 3"])
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
    if objective in MAPS:  # whose map is then the way to every time
        models = replace(exact, teacher=models.teacher, student=models.teacher.network, target=models.teacher.network)
    own = made(objective, step=32, guidance="free", distance="l2", weighting="uniform")
    assert models.loss(own, batch, rng).max().item() < 1e-5


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
    losses = [models.loss(made(objective, step=k, distance="l2"), batch, rng) for k in SKIPS]
    residuals = [loss.mean().sqrt().item() for loss in losses]
    assert slope(SKIPS, residuals) == pytest.approx(1, abs=0.3)
    assert residuals[0] > 10 * rms_residuals(objective, SCHEDULES["VP"])[0]


@pytest.mark.parametrize("objective", ["lcm", "tcd", "pcm"])
def test_free_guidance_follows_the_teacher_as_it_is(objective: str) -> None:
    residuals = rms_residuals(objective, SCHEDULES["VP"], guidance="free")
    assert slope(SKIPS, residuals) == pytest.approx(2, abs=0.2)
    assert residuals[0] < rms_residuals(objective, SCHEDULES["VP"])[0]


@pytest.mark.parametrize("distance", DISTANCES)
@each_objective
def test_gradients_reach_the_student_only(objective: str, distance: Any) -> None:
    exact = oracle_models(smooth_schedule(1000), NULL)
    if objective in MAPS:
        exact = replace(exact, student=exact.teacher.network, target=exact.teacher.network)
    factors = {role: torch.tensor([1.1], requires_grad=True) for role in ("teacher", "student", "target")}
    models = exact
    for role, factor in factors.items():
        models = models.with_network(role, scaled(exact.network(role), factor))
    loss = models.loss(made(objective, distance=distance), gaussian_batch(8), Rng(0, 0, range(8)))
    assert loss.shape == (8,)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    gradient = factors["student"].grad
    assert gradient is not None
    assert gradient.abs().item() > 1e-3
    assert factors["teacher"].grad is None
    assert factors["target"].grad is None


@pytest.mark.parametrize(
    ("times", "expected"), [("grid", {4, 9, 14, 19}), ("all", set(range(5, 22)))], ids=["grid", "all"]
)
def test_times_cover_what_they_should(times: str, expected: set[int]) -> None:
    t, s = sample_times(smooth_schedule(22), 5, times, Rng(seed=0, step=0, places=range(400)))
    assert set(t.tolist()) == expected
    assert t.bincount()[t.bincount() > 0].min() > 400 / len(expected) / 3
    assert s.tolist() == [max(i - 5, 0) for i in t.tolist()]


@pytest.mark.parametrize(
    "schedule", [smooth_schedule(20), KarrasSchedule(num_steps=20), FlowSchedule(20)], ids=["VP", "Karras", "flow"]
)
def test_an_end_is_any_step_up_to_s(schedule: NoiseSchedule) -> None:
    steps, rng = schedule.grid(20), Rng(0, 0, range(300))
    assert (sample_end_time(schedule, steps[:1].expand(300), rng) == steps[0]).all()
    found = sample_end_time(schedule, steps[4:5].expand(300), rng)
    assert set(found.tolist()) == set(steps[:5].tolist())
    assert min(int((found == step).sum()) for step in steps[:5]) > 300 / 5 / 2
    assert (
        sample_end_time(schedule, sample_times(schedule, 5, "all", rng)[1], rng)
        <= sample_times(schedule, 5, "all", rng)[1]
    ).all()


@on_a_skipping_grid
def test_networks_are_called_at_the_right_times_and_omega(objective: str) -> None:
    schedule = smooth_schedule(1000)
    asked = asked_of(objective, schedule, skip=50)
    ((t, w),), ((s, target_w),) = asked["student"], asked["target"]
    assert torch.equal(t, sample_times(schedule, 50, "grid", Rng(0, 0, range(64)))[0])
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
def test_with_free_guidance_omega_is_absent_and_the_teacher_runs_once(objective: str) -> None:
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


@pytest.mark.parametrize(
    "schedule", [smooth_schedule(1000), KarrasSchedule(), FlowSchedule()], ids=["VP", "Karras", "flow"]
)
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
    own = made(objective, solver="euler", **BAKED.get(objective, {}))
    loss = exact.loss(own, gaussian_batch(8), rng)
    monkeypatch.setattr("lcmdistill.diffusion.solvers.euler", lambda denoiser, schedule, z, t, s: z)
    assert (exact.loss(own, gaussian_batch(8), rng) > 3 * loss).all()


def counted(objective: Any) -> dict[str, int]:
    """How many samples' worth of forwards each network really takes for one sample."""
    exact = oracle_models(vp_schedule(SD15), NULL)
    counts = {"teacher": 0, "target": 0, "student": 0}

    def counting(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            counts[role] += len(z)
            return X0Eps(z, z)

        return network

    models = exact
    for role in counts:
        models = models.with_network(role, counting(role))
    models.loss(objective, gaussian_batch(1), Rng(0, 0, [0]))
    return counts


@each_objective
def test_declared_forwards_are_those_that_are_counted(objective: str) -> None:
    every: list[dict[str, Any]] = [{}, {"guidance": "free"}, *({"solver": solver} for solver in SOLVERS)]
    for fields in every:
        own = made(objective, **fields)
        assert own.num_forwards == counted(own)


def test_forwards_depend_on_solver_and_guidance() -> None:
    ways: list[Any] = [("ddim", "baked"), ("dpm-solver++", "baked"), ("ddim", "free"), ("heun", "free")]
    forwards = [made("lcm", solver=solver, guidance=guidance).num_forwards["teacher"] for solver, guidance in ways]
    assert forwards == [2, 4, 1, 2]


@each_objective
def test_the_target_is_evaluated_where_the_state_says(objective: str) -> None:
    """On which a training step relies that evaluates it beside the student."""
    exact, own = oracle_models(vp_schedule(SD15), NULL), made(objective)
    batch, rng = gaussian_batch(4), Rng(0, 0, range(4))
    state = own.teacher_step(exact.teacher, exact.schedule, batch, rng)
    seen: dict[str, tuple[Any, ...]] = {}

    def noting(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            seen[role] = (z, t, c, w)
            return X0Eps(z, z)

        return network

    own.loss(noting("student"), noting("target"), exact.schedule, batch, state)
    assert list(seen) == ["student", "target"]  # the target may still be at work in another thread
    for role, wanted in (
        ("student", (state.z_t, state.t, batch.cond, state.w)),
        ("target", (state.z_s, state.s, batch.cond, state.w)),
    ):
        assert all(given is expected for given, expected in zip(seen[role], wanted, strict=True))


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("lcm", {"skip": 0}, "skip"),
        ("lcm", {"skip": 1000}, "from 1 to 999"),
        ("lcm", {"skip": 30}, r"does not divide T = 1000, so t = 999,.* is never trained; try 25 or 40, or"),
        ("tcd", {"skip": 700}, "; try 500, or"),
        ("lcf", {"skip": 700}, "; try 500, or"),
        ("lcm", {"w_min": -0.5}, "w_min is -0.5; omega, which is guidance_scale - 1, must be at least 0"),
        ("tcd", {"w_min": 9.0, "w_max": 8.0}, "w_min"),
        ("lcm", {"ema_decay": 1.0}, "ema_decay"),
        ("cd", {"ema_decay": -0.1}, "ema_decay"),
        ("lcm", {"solver": "magic"}, "ddim"),
        ("cd", {"solver": "magic"}, "ddim"),
        (
            "pcm",
            {"phases": "0"},
            "phases is '0'; it must be a number from 1 to T / k = 50, such as 4, or a range such as 4-8",
        ),
        ("pcm", {"phases": "8-4"}, "phases is '8-4'"),
        ("pcm", {"phases": "four"}, "phases is 'four'"),
        ("pcm", {"phases": "51"}, "from 1 to T / k = 50"),
        ("pcm", {"skip": 0}, "skip"),
        ("cd", {"scales": 1}, "at least 2 points"),
        ("cd", {"distance": "lpips"}, "needs objective.lpips_weights"),
        ("ct", {"lpips_weights": "alexnet.pth"}, "objective.distance is l2; set it to lpips"),
        ("ct", {"s0": 0}, "1 <= s0 <= s1"),
        ("ct", {"s0": 1}, "a first grid of one point; it must be at least 2"),
        ("ct", {"s0": 20, "s1": 10}, "1 <= s0 <= s1"),
        ("ct", {"mu0": 1.0}, "mu0 is 1.0"),
        ("ct", {"curriculum_steps": 0}, r"\(K\) is 0"),
        ("ict", {"p_std": 0.0}, "p_std"),
        ("ect", {"q": 1.0}, "q is 1; it must be above 1, such as 2, or 256 with one stage"),
        ("ect", {"stages": 0}, "stages is 0; it must be from 1 to 64"),
        ("ect", {"huber_c": -1.0}, "huber_c"),
        ("ect", {"ema_decay": 1.0}, "ema_decay is 1.0"),
        ("ect", {"curriculum_steps": 0}, r"\(K\) is 0"),
        ("ect", {"p_std": 0.0}, "p_std"),
    ],
)
def test_impossible_fields_are_refused(objective: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[objective](**fields).check(1000)


@pytest.mark.parametrize("skip", [30, 999])
@on_a_skipping_grid
def test_drawn_from_every_time_any_skip_is_possible(objective: str, skip: int) -> None:
    made(objective, skip=skip, times="all").check(1000)


@each_objective
def test_defaults_are_possible(objective: str) -> None:
    assert OBJECTIVES[objective]().check(1000) is None


@pytest.mark.parametrize(
    ("counts", "span", "text"),
    [
        ((4, 2, 8), "2 to 8 steps", "4 steps (2 to 8)"),
        ((4, 4, 4), "4 steps", "4 steps"),
        ((1, 1, 1), "1 step", "1 step"),
    ],
)
def test_numbers_of_steps_in_words(counts: tuple[int, int, int], span: str, text: str) -> None:
    assert (StepCounts(*counts).span, StepCounts(*counts).text) == (span, text)
