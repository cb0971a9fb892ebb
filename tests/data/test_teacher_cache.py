"""Cached latents and teacher outputs: made once, complete or made again, equal to those that a run computes."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lcmdistill.data import teacher_cache
from lcmdistill.data.loader import batch_of
from lcmdistill.data.teacher_cache import cached_noise_index, precompute
from lcmdistill.diffusion.random import Rng
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.training import setup as loop
from lcmdistill.training.preflight import dry_run
from lcmdistill.utils.errors import Interrupted, RunError, UsageError
from tests.support.runs import distill, resolve
from tests.support.speed import Settings, built
from tests.support.training import assert_same, losses

CPU = torch.device("cpu")


def one_evaluation() -> list[str]:
    """The objectives that ask a teacher at all."""
    names = [name for name, kind in OBJECTIVES.items() if "solver" in kind.__dataclass_fields__]
    return [name for name in names if OBJECTIVES[name](solver="ddim").num_forwards["teacher"]]


EACH_ASKING = [
    (name, guidance) for name in one_evaluation() for guidance in ("baked", "free")[: 2 if name != "cd" else 1]
]


@pytest.mark.parametrize(("name", "guidance"), EACH_ASKING)
def test_a_cached_teacher_output_equals_the_teacher_s(name: str, guidance: str, speed_settings: Settings) -> None:
    """At the same draws the loss is what the live teacher makes of it, but for the 11 bits that are kept."""
    own = {"objective__guidance": guidance}
    if name == "cd":
        speed_settings, own = {k: v for k, v in speed_settings.items() if "w_m" not in k}, {}
    run = built(
        speed_settings,
        objective__name=name,
        objective__solver="ddim",
        data__teacher_cache_samples=2,
        data__caption_drop=0.3,
        **own,
    )
    step, feed = cast("Any", run.train_step), cast("Any", run.feed)
    assert step.teacher_outputs is not None
    draws = [(5, 1), (0, 0), (5, 0)]
    rng = Rng(run.config.run.seed, 9, range(3), fixed_draws=draws)
    batch = batch_of(feed.dataset.read([index for index, _ in draws]), rng, step.null, 0.3)

    def loss(state: Any) -> torch.Tensor:
        return step.objective.loss(step.student_network, step.target_network, step.schedule, batch, state)

    live = loss(step.objective.teacher_step(step.teacher, step.schedule, batch, rng))
    torch.testing.assert_close(loss(step.prepare(batch, rng)), live, rtol=2e-3, atol=2e-5)
    assert live.std() > 0.01 * live.mean()  # the three differ
    # The outputs of other draws, at the times and noise of these.
    others = step.teacher_outputs.teacher(replace(rng, fixed_draws=draws[::-1]), step.schedule, step.null)
    other = loss(step.objective.teacher_step(others, step.schedule, batch, rng))
    assert not torch.allclose(other, live, rtol=2e-3)


def test_omega_stays_free_and_the_rest_is_the_sample_s_own(speed_settings: Settings) -> None:
    asked = [(3, 0), (3, 1), (4, 0)]
    one, two = (Rng(0, step, range(3), fixed_draws=asked) for step in (1, 2))
    for stream in ("posterior", "noise", "times", "caption-drop"):
        assert torch.equal(one.uniform(stream), two.uniform(stream))
        assert len(set(one.uniform(stream).tolist())) == 3
    assert not torch.equal(one.uniform("omega", fresh=True), two.uniform("omega", fresh=True))


def test_every_epoch_meets_another_draw_and_then_the_first_again() -> None:
    assert [cached_noise_index(step, range(4), 4, 8, 2) for step in range(5)] == [
        [0] * 4,
        [0] * 4,
        [1] * 4,
        [1] * 4,
        [0] * 4,
    ]
    assert cached_noise_index(1, range(4), 4, 6, 3) == [0, 0, 1, 1]


def test_teacher_outputs_are_computed_once_for_every_omega_and_adapter(
    speed_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(speed_settings, data__teacher_cache_samples=2)
    (folder,) = Path(speed_settings["data.cache_dir"], "teacher-outputs").iterdir()
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(files) == 1
    again = built(
        speed_settings, data__teacher_cache_samples=2, objective__w_max=3.0, objective__w_min=2.0, student__kind="lora"
    )
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == files
    assert again.train_step.cache_folders == [folder]
    for changed in (
        {"objective__skip": 50},
        {"run__seed": 1},
        {"data__caption_drop": 0.5},
        {"objective__guidance": "free"},
    ):
        built(speed_settings, data__teacher_cache_samples=2, **changed)
    assert len(list(folder.parent.iterdir())) == 5


def test_teacher_outputs_removed_during_caching_are_noticed(
    speed_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_in_vain(*given: Any, **options: Any) -> Path:
        folder = precompute(*given, **options)
        shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(loop, "precompute", asked_in_vain)
    with pytest.raises(RunError, match=r"were deleted while this run filled it.*raise data\.cache_limit"):
        built(speed_settings, data__teacher_cache_samples=1)
    monkeypatch.undo()
    assert built(speed_settings, data__teacher_cache_samples=1).train_step.cache_folders


@pytest.mark.parametrize("kind", ["latents", "teacher-outputs"])
def test_a_truncated_file_is_made_again(kind: str, speed_settings: Settings, tmp_path: Path) -> None:
    settings = {**speed_settings, "data.teacher_cache_samples": 1, "optim.max_train_steps": 1}
    distill(resolve({}, settings))
    (file,) = Path(speed_settings["data.cache_dir"], kind).rglob("*.safetensors")
    whole = file.read_bytes()
    for left in (whole[:-1], b""):
        file.write_bytes(left)
        distill(resolve({}, {**settings, "run.output": str(tmp_path / str(len(left)))}))
        assert file.read_bytes() == whole


def test_an_interrupted_caching_resumes_where_it_stopped(
    speed_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third of three batches: the first two are kept, and the file is as if nothing had happened."""
    options = {"data__teacher_cache_samples": 2, "optim__batch_size": 10}
    built(speed_settings, **options)
    (file,) = Path(speed_settings["data.cache_dir"], "teacher-outputs").rglob("*.safetensors")
    whole = file.read_bytes()
    file.unlink()
    calls, compute = [0], teacher_cache._outputs

    def interrupted(*arguments: Any) -> dict[str, torch.Tensor]:
        calls[0] += 1
        if calls[0] == 3:
            raise Interrupted("stopped", 2)
        return compute(*arguments)

    monkeypatch.setattr(teacher_cache, "_outputs", interrupted)
    with pytest.raises(Interrupted):
        built(speed_settings, **options)
    assert file.with_suffix(".part").exists()
    assert not file.exists()
    built(speed_settings, **options)
    assert calls[0] == 4
    assert file.read_bytes() == whole
    assert not file.with_suffix(".part").exists()


def test_a_dry_run_tells_what_asking_beforehand_takes(
    speed_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(resolve({}, {**speed_settings, "data.teacher_cache_samples": 1000}))
    output = capsys.readouterr().out
    assert re.search(r"caching teacher outputs +[\d.]+ \S+( \d+ s)?  24,000 outputs", output)
    assert re.search(r"cached teacher outputs +[\d.]+ MB  24,000, unless they are ready", output)


def test_a_run_on_cached_teacher_outputs_resumes_bit_for_bit(speed_settings: Settings, tmp_path: Path) -> None:
    settings = {
        **speed_settings,
        "data.teacher_cache_samples": 2,
        "optim.max_train_steps": 4,
        "run.checkpoint_every": 2,
    }
    whole = distill(resolve({}, {**settings, "run.output": str(tmp_path / "whole")}))
    for steps in (2, 4):
        cut = distill(resolve({}, {**settings, "run.output": str(tmp_path / "cut"), "optim.max_train_steps": steps}))
    assert_same(whole, cut)
    live = distill(resolve({}, {**settings, "run.output": str(tmp_path / "live"), "data.teacher_cache_samples": 0}))
    assert losses(live) != losses(whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective.solver": "heun"},
            r"one teacher evaluation per step, and heun takes two; use --solver ddim or euler",
        ),
        ({"objective.name": "ct"}, "this objective has no teacher; use 0"),
        ({"data.buckets": ("16x24", "16x16")}, "set it to 0, or remove data.buckets"),
        ({"data.teacher_cache_samples": -1}, "must be at least 0"),
    ],
)
def test_what_cannot_be_cached_is_refused(values: Settings, message: str, speed_settings: Settings) -> None:
    others = {k: v for k, v in speed_settings.items() if "w_m" not in k or "objective.name" not in values}
    with pytest.raises(UsageError, match=message):
        distill(resolve({}, {**others, "data.teacher_cache_samples": 2, **values}))
    assert not Path(speed_settings["run.output"]).exists()
