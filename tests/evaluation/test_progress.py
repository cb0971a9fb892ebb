"""The progress of an evaluation: totals, what is generated in words, the time left, and what an interruption keeps."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcmdistill.data.chunks import PART
from lcmdistill.evaluation import progress as evaluation_progress
from lcmdistill.evaluation.latents import _generate_batches
from lcmdistill.evaluation.progress import ImageSeconds, SweepProgress, describe_point
from lcmdistill.evaluation.self_consistency import curve_evaluations
from lcmdistill.evaluation.sweep import Sweep, SweepPoint, cached_latents
from lcmdistill.utils import logging as messages
from lcmdistill.utils.logging import progress

SWEEP = Sweep(prompts=("a", "b"), steps=(1, 4), guidance_scales=(7.5,), resolution=64, seed=0)

SECONDS = 2 * (7 * 0.5 + (100 + 1 + 4 + 2 * 2 + 2 * 8) * 1.0) + curve_evaluations(2)
"of the sweep: two images at each of seven points"


def test_guidance_that_is_an_input_takes_one_evaluation_per_step() -> None:
    state = SweepProgress(SWEEP, ImageSeconds(evaluation=1.0, decode=0.5), applies_cfg=False)
    assert state.seconds == pytest.approx(2 * (7 * 0.5 + 50 + 3 * (1 + 4)) + curve_evaluations(2))


def test_the_progress_is_in_images_and_words(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    for module in (messages, evaluation_progress):
        monkeypatch.setattr(module, "clock", lambda: now[0])
    state = SweepProgress(SWEEP, ImageSeconds(evaluation=1.0, decode=0.5))
    assert (state.total, state.seconds) == (14, pytest.approx(SECONDS))
    teacher, one, four = SWEEP.points()[:3]
    with progress("evaluating", state.total) as bar, caplog.at_level(logging.INFO, "lcmdistill"):
        state.show(bar, after=10.0)
        assert bar.seconds_left == pytest.approx(SECONDS + 10)
        state.finished(teacher, measured=False)  # its results are there
        assert bar.seconds_left == pytest.approx(SECONDS - 201 + 10)
        state.starts(one)
        now[0] = 4.0
        state.generated(one, 2)  # 2 seconds were expected: everything takes twice as long
        assert bar.seconds_left == pytest.approx(2 * (SECONDS - 201 - 2 + 10))
        now[0] = 6.0
        state.finished(one, measured=True)
        state.finished(four, measured=True)  # its latents are there, and its results are not
        assert state._images[four] == 0
    assert caplog.messages == ["generating 2 images: student, 1 step, guidance scale 7.5  left 6 min 12 s"]


def test_points_have_no_internal_names() -> None:
    assert describe_point(SweepPoint("teacher", 50, 7.5)) == "teacher, 50 steps, guidance scale 7.5"
    assert describe_point(SweepPoint("trailing", 1, 3)) == "teacher with trailing time steps, 1 step, guidance scale 3"


def test_an_interrupted_point_keeps_its_batches(tmp_path: Path) -> None:
    path, noise, requested = tmp_path / "a.safetensors", torch.arange(7.0).view(7, 1, 1, 1), list[list[int]]()

    def generate(done: dict[int, Tensor], stop_at: int = -1) -> Tensor:
        def batch(indices: list[int], z: Tensor) -> Tensor:
            if stop_at in indices:
                raise KeyboardInterrupt
            requested.append(indices)
            return 2 * z

        return _generate_batches(noise, 2, batch, lambda images: None, done)

    with pytest.raises(KeyboardInterrupt):
        cached_latents(path, lambda done: generate(done, stop_at=5))
    assert path.with_suffix(PART).exists()
    found = cached_latents(path, generate)
    assert requested == [[0, 1], [2, 3], [4, 5], [6]]
    assert torch.equal(torch.stack(list(found.latents)), 2 * noise)
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
