"""Students are sampled at times that they were trained at: for every k, every grid and every number of steps."""

from typing import Any

import pytest
from diffusers import LCMScheduler, TCDScheduler

from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import VPSchedule, ddim_grid, vp_schedule
from lcmdistill.objectives.cd import ConsistencyDistillation
from lcmdistill.objectives.common import skipping_grid_options
from lcmdistill.objectives.ct import ConsistencyTraining, ImprovedConsistencyTraining
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.teachers.schedulers import vp_scheduler

SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

DIVISORS = [k for k in range(1, 1000) if 1000 % k == 0]


def sampled_times(objective: Any, kind: str = "LCMScheduler", total: int = 1000) -> set[int]:
    """The times at which a student is sampled, with any number of steps."""
    options = skipping_grid_options(objective, total)
    scheduler: LCMScheduler | TCDScheduler = vp_scheduler({**SD15, "num_train_timesteps": total}, kind, options)
    times: set[int] = set()
    for steps in range(1, scheduler.config["original_inference_steps"] + 1):
        scheduler.set_timesteps(steps)
        times |= set(scheduler.timesteps.tolist())
        assert int(scheduler.timesteps[0]) == total - 1
    return times


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("k", DIVISORS)
def test_the_grid_of_every_k(k: int, kind: str) -> None:
    assert sampled_times(LatentConsistency(skip=k), kind) <= set(ddim_grid(1000, k).tolist())


@pytest.mark.parametrize("k", [1, 2, 19, 20, 21, 50, 77, 100, 333, 500, 999])
def test_all_time_steps_from_k(k: int) -> None:
    # At k = 20 with 50 steps, which nobody takes, the last is the one below k.
    assert sampled_times(LatentConsistency(skip=k, times="all")) <= {*range(k, 1000), *([19] if k == 20 else [])}


@pytest.mark.parametrize(
    ("objective", "count"),
    [
        *((ConsistencyDistillation(scales=n), None) for n in (2, 3, 6, 9, 18, 40, 101, 151, 201, 401, 501, 1000, 1001)),
        (ConsistencyDistillation(), 50),
        (ConsistencyTraining(), 50),
        (ImprovedConsistencyTraining(), 40),
        (ImprovedConsistencyTraining(s1=1000), 50),
    ],
    ids=repr,
)
def test_the_grids_of_consistency_models(objective: Any, count: int | None) -> None:
    schedule, points = vp_schedule(SD15), objective.grid_intervals + 1
    assert isinstance(schedule, VPSchedule)
    grid = schedule.grid(points)
    assert sampled_times(objective) <= set(grid.tolist())
    assert (int(grid[0]), int(grid[-1]), len(grid)) == (0, 999, points)
    assert bool((grid.diff() > 0).all())
    assert float(grid.double().diff().max() - grid.double().diff().min()) <= 1.5  # evenly spaced, up to rounding
    assert count is None or skipping_grid_options(objective, 1000).get("original_inference_steps", 50) == count


def test_a_run_of_a_consistency_model_trains_on_that_grid() -> None:
    objective, schedule = ConsistencyDistillation(scales=5), vp_schedule(SD15)
    rng = Rng(0, 0, range(64))
    t, s = objective.sample_timesteps(schedule, rng)
    assert set(t.tolist()) == {249, 499, 749, 999}
    assert set(s.tolist()) == {0, 249, 499, 749}
