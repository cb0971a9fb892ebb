"""Schedules of teachers as their pipelines step through them: spacings, zero-terminal SNR, and a student's sampling grid."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.chunks import draw_spacing
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.schedules import ddim_grid, vp_schedule
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.schedulers import vp_scheduler
from lcmdistill.utils.errors import UsageError
from tests.support.data import prepared
from tests.support.schedules import CONFIGS
from tests.support.solvers import network_denoiser, noise
from tests.support.teachers import edited

each_config = pytest.mark.parametrize("name", list(CONFIGS))

DDIMScheduler: Any = diffusers.DDIMScheduler


def v_teacher(small_teacher: Path, to: Path, **changes: Any) -> Path:
    """A copy of the small teacher that predicts v, its scheduler changed."""
    file = "scheduler/scheduler_config.json"
    return edited(small_teacher, to, file, lambda config: {**config, "prediction_type": "v_prediction", **changes})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@each_config
def test_a_walk_of_ddim_equals_diffusers_at_every_spacing(name: str, spacing: str) -> None:
    """From pure noise, alpha = 0 included, to the first time step, on v-predictions."""
    config = {**CONFIGS[name], "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": spacing}
    scheduler = DDIMScheduler(**config, prediction_type="v_prediction")
    schedule = vp_schedule(CONFIGS[name])
    denoiser, raw = network_denoiser(schedule, "v_prediction")
    scheduler.set_timesteps(5)
    skip = schedule.num_steps // 5
    z = noise(2, 4, 8, 8)
    for t in scheduler.timesteps:
        times = t.repeat(2)
        expected = scheduler.step(raw(z, times), t, z).prev_sample
        found = SOLVERS["ddim"](denoiser, schedule, z, times, (times - skip).clamp(min=0))
        assert found.isfinite().all()
        # diffusers reaches zero-terminal SNR by way of the betas, which rounds a few times more
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        z = expected
    if spacing == "trailing":
        assert int(scheduler.timesteps[0]) == schedule.num_steps - 1


@each_config
def test_a_student_s_scheduler_steps_on_the_trained_grid_and_stays_finite(name: str) -> None:
    config = DDIMScheduler(**CONFIGS[name], prediction_type="v_prediction").config  # whole, as a teacher's is
    schedule = vp_schedule(config)
    if schedule.num_steps != 1000:
        pytest.skip("LCMScheduler's grid of 50 points is that of 1000 steps")
    denoiser, raw = network_denoiser(schedule, "v_prediction")
    scheduler = vp_scheduler(config, "LCMScheduler", {})
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= set(ddim_grid(1000, 20).tolist())
        assert int(scheduler.timesteps[0]) == 999
        assert all(a > b for a, b in pairwise(scheduler.timesteps.tolist()))
        z = noise(2, 4, 8, 8)
        for t in scheduler.timesteps:
            times = t.repeat(2)
            step = scheduler.step(raw(z, times), t, z, generator=torch.Generator().manual_seed(0))
            ours = consistency_function(schedule, z, denoiser(z, times).x0, times)
            torch.testing.assert_close(step.denoised, ours, rtol=1e-3, atol=1e-3)
            assert step.prev_sample.isfinite().all()
            z = step.prev_sample


def test_an_epsilon_teacher_whose_schedule_ends_in_noise_is_refused(small_teacher: Path, tmp_path: Path) -> None:
    folder = v_teacher(small_teacher, tmp_path / "m", prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(UsageError, match=r"ends at alpha = 0 .*--prediction-type v_prediction"):
        load_teacher(str(folder))
    assert load_teacher(str(folder), prediction_type="v_prediction").prediction_type == "v_prediction"


@pytest.mark.parametrize("zero_snr", [True, False])
def test_a_teacher_is_sampled_from_the_start_of_its_noise(
    zero_snr: bool, small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With zero-terminal SNR at T - 1 whatever spacing its folder says; else as the folder says."""
    folder = v_teacher(small_teacher, tmp_path / "m", rescale_betas_zero_snr=zero_snr, timestep_spacing="leading")
    teacher, times = load_teacher(str(folder)), []
    assert draw_spacing(teacher) == ({"timestep_spacing": "trailing"} if zero_snr else {})
    forward = teacher.network.forward
    monkeypatch.setattr(
        teacher.network, "forward", lambda z, t, *a, **k: (times.append(int(t)), forward(z, t, *a, **k))[1]
    )
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = DataConfig(
        prompts=str(tmp_path / "prompts.txt"), resolution=16, teacher_steps=4, cache_dir=str(tmp_path / "c")
    )
    mean = LatentDataset([prepared("teacher", config, teacher, 0)], [None]).read([0])[0]
    assert mean.isfinite().all()
    assert (times[0] == 999) is zero_snr
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["timestep_spacing"] == "leading"
