"""Cached trajectories: what is stored and read again, what is part of their key, and where they are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmdistill.config.schema import RunConfig
from lcmdistill.data import chunks
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import cache_folder, prepare
from lcmdistill.data.loader import batch_of
from lcmdistill.data.trajectories import TrajectoryPlan, check_trajectory
from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.random import Rng, derive_seed
from lcmdistill.diffusion.trajectory import solve_trajectory
from lcmdistill.diffusion.types import TeacherNetwork, x0_eps_network
from lcmdistill.students.student import AutocastNetwork, raw_network
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.run_data import sources_of
from lcmdistill.utils.errors import Interrupted, UsageError
from tests.support.data import contents
from tests.support.runs import resolve

PROMPTS = "a cat\na dog\na cow\n"


def config_of(cache: Path, **changes: Any) -> RunConfig:
    """A run on trajectories of three points, from three prompts."""
    prompts = cache.parent / "prompts.txt"
    prompts.write_text(PROMPTS)
    settings = {"objective.name": "pcm", "data.resolution": 16, "data.max_samples": 7, "data.teacher_steps": 6}
    settings |= {"data.prompts": str(prompts), "data.cache_dir": str(cache), "data.trajectory": 3}
    return resolve({}, {**settings, **{key.replace("__", "."): value for key, value in changes.items()}})


def folder_of(config: RunConfig, teacher: Teacher) -> Path:
    (source,) = sources_of(config, teacher)
    return cache_folder(source, config.data, teacher, config.run.seed)


def prepared(config: RunConfig, teacher: Teacher, **options: Any) -> Path:
    (source,) = sources_of(config, teacher)
    return prepare(source, config.data, teacher, config.run.seed, **options)


def read(config: RunConfig, teacher: Teacher, indices: range) -> Any:
    return LatentDataset([prepared(config, teacher)], [7]).read(indices)


@pytest.mark.parametrize("guidance", ["baked", "free"])
def test_the_trajectory_of_a_caption_is_stored_and_read(guidance: str, tmp_path: Path, teacher: Teacher) -> None:
    config = config_of(tmp_path / "cache", objective__guidance=guidance, data__caption_drop=0.1)
    plan = TrajectoryPlan.of(config)
    assert plan is not None
    mean, std, cond, trajectory = read(config, teacher, range(7))
    assert trajectory.states.shape == (7, 3, 4, 8, 8)
    assert not std.any()
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(derive_seed(0, "draw", i))) for i in range(7)]
    torch.testing.assert_close(trajectory.states[:, -1], torch.stack(noise), rtol=1e-3, atol=1e-3)
    if guidance == "free":
        assert trajectory.omega is None
    else:
        assert ((trajectory.omega >= 3) & (trajectory.omega <= 4)).all()
        assert len(set(trajectory.omega.tolist())) == 7
    raw = raw_network(AutocastNetwork(teacher.network, teacher.call, torch.float32))
    network = TeacherNetwork(
        x0_eps_network(raw, teacher.schedule, teacher.prediction_type), teacher.encode_prompts([""])
    )
    with torch.no_grad():
        denoiser = network.denoiser(cond, trajectory.omega)
        states, clean = solve_trajectory(denoiser, teacher.schedule, torch.stack(noise), 3, 2, SOLVERS["ddim"])
    torch.testing.assert_close(trajectory.states, states, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(mean, clean, rtol=2e-3, atol=2e-3)


def test_a_batch_has_the_trajectories_of_its_samples(tmp_path: Path, teacher: Teacher) -> None:
    found = read(config_of(tmp_path / "cache"), teacher, range(2, 5))
    batch = batch_of(found, Rng(0, 0, range(3)), teacher.encode_prompts([""]), 0.0)
    assert batch.trajectory is not None
    assert torch.equal(batch.trajectory.states, found.trajectory.states)
    assert torch.equal(batch.latents, found.mean)


def test_without_trajectories_nothing_is_added(tmp_path: Path, teacher: Teacher) -> None:
    config = config_of(tmp_path / "cache", data__trajectory=0)
    found = read(config, teacher, range(7))
    assert found.trajectory is None
    assert batch_of(found, Rng(0, 0, range(7)), teacher.encode_prompts([""]), 0.0).trajectory is None
    pcm, lcm = folder_of(config, teacher), folder_of(config_of(tmp_path / "cache", data__trajectory=0), teacher)
    assert pcm == lcm  # finished latents serve every method


def test_what_shapes_the_trajectories_is_in_the_key(tmp_path: Path, teacher: Teacher) -> None:
    def key(**changes: Any) -> Path:
        return folder_of(config_of(tmp_path / "cache", **changes), teacher)

    same = [key(objective__phases=phases) for phases in ("2", "4", "4-8")]
    same += [key(data__guidance_scale=2.0), key(objective__skip=10), key(data__max_samples=3)]
    same += [key(objective__name="lcm", objective__w_min=3.0, objective__w_max=4.0)]
    assert set(same) == {key()}
    changed = [key()]
    changed += [key(data__trajectory=points) for points in (0, 4)]
    changed += [key(data__teacher_steps=7), key(run__seed=1), key(objective__solver="heun")]
    changed += [key(objective__w_min=2.0), key(objective__w_max=3.0)]
    changed += [key(objective__guidance="free", data__caption_drop=0.1)]
    assert len(set(changed)) == len(changed)


def test_two_processes_and_an_interruption_change_nothing(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "PIXELS_PER_BATCH", 2 * 16 * 16)  # two at once
    whole = contents(prepared(config_of(tmp_path / "whole"), teacher))
    config = config_of(tmp_path / "parts")

    def stop(done: int) -> None:
        if done >= 4:
            raise Interrupted("stopped", 2)

    with pytest.raises(Interrupted):
        prepared(config, teacher, on_progress=stop)
    assert len(list((tmp_path / "parts").rglob("*.part"))) == 1
    prepared(config, teacher, rank=1, world=2)  # whose share of one chunk is none
    assert contents(prepared(config, teacher, rank=0, world=2)) == whole
    (path,) = folder_of(config, teacher).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert contents(prepared(config, teacher)) == whole


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 3), ("heun", 2)])
def test_as_many_evaluations_are_made_as_are_counted(
    solver: str, steps: int, tmp_path: Path, small_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(str(small_teacher))
    config = config_of(tmp_path / "cache", objective__solver=solver, data__teacher_steps=8, data__max_samples=1)
    plan = TrajectoryPlan.of(config)
    assert plan is not None
    assert plan.steps(1000) == steps
    calls: list[int] = []
    forward = teacher.network.forward

    def counted(z: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(len(z))
        return forward(z, *args, **options)

    monkeypatch.setattr(teacher.network, "forward", counted)
    prepared(config, teacher)
    assert sum(calls) == plan.forwards(teacher) == 2 * (3 * steps * SOLVERS[solver].evaluations + 1)


def test_the_steps_of_a_segment_stay_within_the_time_steps_of_the_teacher() -> None:
    plan = TrajectoryPlan(points=10, evaluations=1000, solver="ddim", omega=None)
    assert plan.steps(1000) == 50
    assert plan.steps(40) == 2
    assert replace(plan, points=20).steps(40) == 1


@pytest.mark.parametrize(
    ("changes", "is_generated", "message"),
    [
        ({"objective__name": "tdm"}, True, "--objective tdm learns from prompts alone"),
        ({"objective__name": "ect"}, True, "--objective ect takes no step of the teacher"),
        ({}, False, "images have no trajectory of the teacher; use --data teacher only"),
        ({"data__trajectory": 501}, True, r"it must be from 0 to T / 2 = 500, such as 8"),
    ],
)
def test_where_there_is_no_trajectory_it_is_refused(
    changes: dict[str, Any], is_generated: bool, message: str, tmp_path: Path, teacher: Teacher
) -> None:
    config = config_of(tmp_path / "cache", **changes)
    with pytest.raises(UsageError, match=message):
        check_trajectory(config, teacher, is_generated=is_generated)
    off = config_of(tmp_path / "cache", **{**changes, "data__trajectory": 0})
    check_trajectory(off, teacher, is_generated=is_generated)


def test_inpainting_models_are_refused(tmp_path: Path, teacher: Teacher) -> None:
    family = replace(teacher.family, condition_is_random=True)
    with pytest.raises(UsageError, match="an inpainting model is trained on masks of finished images"):
        check_trajectory(config_of(tmp_path / "cache"), replace(teacher, family=family), is_generated=True)
