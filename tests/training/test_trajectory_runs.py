"""Runs that start on the teacher's own trajectories: resumed bit for bit, planned, and distinguished from other runs."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lcmdistill.data.loader import batch_of
from lcmdistill.diffusion.random import Rng
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.cost_disk import disk_items
from lcmdistill.training.cost_time import Rates, SourceSamples, phases
from lcmdistill.training.memory.estimate import step_memory
from lcmdistill.utils.errors import UsageError
from tests.support.methods import MethodRunner
from tests.support.runs import resolve
from tests.support.speed import Settings, built
from tests.support.training import assert_same, losses

OWN: dict[str, Any] = {
    "data__sources": ("teacher",),
    "data__max_samples": 6,
    "data__teacher_steps": 4,
    "data__trajectory": 2,
    "objective__phases": "2",
}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_resumes_bit_for_bit(kind: str, method_run: MethodRunner, tmp_path: Path) -> None:
    own = {**OWN, "student__kind": kind, "student__rank": 4, "data__cache_dir": str(tmp_path / "cache")}
    whole = method_run("pcm", "whole", **own)
    method_run("pcm", "parts", optim__max_train_steps=2, **own)
    parts = method_run("pcm", "parts", **own)
    assert losses(parts) == losses(whole)
    if kind == "full":
        assert_same(parts, whole)
        with pytest.raises(UsageError, match=r"contains a run with data\.trajectory = 2 \(this command: 4\)"):
            method_run("pcm", "parts", **{**own, "data__trajectory": 4})


def test_cached_teacher_outputs_are_those_on_the_trajectories(speed_settings: Settings) -> None:
    settings = {key: value for key, value in speed_settings.items() if "w_m" not in key}
    run = built(settings, **OWN, objective__name="pcm", data__teacher_cache_samples=2)
    step, feed = cast("Any", run.train_step), cast("Any", run.feed)
    draws = [(5, 1), (0, 0), (5, 0)]
    rng = Rng(run.config.run.seed, 9, range(3), fixed_draws=draws)
    batch = batch_of(feed.dataset.read([index for index, _ in draws]), rng, step.null, 0.0)
    assert batch.trajectory is not None
    cached, live = step.prepare(batch, rng), step.objective.teacher_step(step.teacher, step.schedule, batch, rng)
    assert torch.equal(cached.z_t, batch.trajectory.at(step.schedule, batch.latents, cached.t))
    torch.testing.assert_close(cached.z_s, live.z_s, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(cached.z_s, cached.z_t, atol=2e-3)


def test_the_plan_counts_trajectories(small_teacher: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    settings = {key.replace("__", "."): value for key, value in OWN.items()}
    settings |= {"objective.name": "pcm", "teacher.model": str(small_teacher), "data.resolution": 16}
    settings |= {"run.validate_every": 0, "run.output": str(tmp_path / "run")}
    samples = [SourceSamples(True, 100, 20)]
    latent = 4 * 8 * 8
    found: dict[int, tuple[int, float, float]] = {}
    for points in (0, 2):
        config = resolve({}, {**settings, "data.trajectory": points})
        memory = step_memory(config, teacher, torch.float32)
        items = {item.name: item.size for item in disk_items(config, teacher, memory, samples)}
        rates = Rates(forward=1, backward=2, update=0, encode=3, decode=4, caption=0)
        seconds = {each.name: each.seconds for each in phases(config, teacher, samples, rates, written=0)}
        name = "trajectories" if points else "latents"
        found[points] = memory.activations, items[f"cached {name}"], seconds["generating latents"]
    assert found[2][1] - found[0][1] == 80 * 2 * 2 * latent  # fp16
    assert (found[0][2], found[2][2]) == (80 * 4 * 2, 80 * 5 * 2)
    assert found[2][0] >= found[0][0]
