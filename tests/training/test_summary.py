"""What a run costs: the summary covers every phase and everything that is written, compared with real runs."""

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.data.sources.registry import make_sources
from lcmdistill.data.survey import SourceReport
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training import cost_time, preflight, summary
from lcmdistill.training.cost_time import (
    ENCODING,
    GENERATING,
    REFERENCES,
    TEACHER_OUTPUTS,
    TRAINING,
    VALIDATION,
    WRITING,
    Phase,
    Rates,
    SourceSamples,
    TimeLeft,
    phases,
    samples_of,
    with_read_seconds,
)
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.training.summary import Cost, estimate_cost, log_summary
from lcmdistill.utils import run_dir, runtime
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.data import write_tar
from tests.support.runs import distill, resolve
from tests.support.training import Runner

Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture(autouse=True)
def _fixed_costs() -> None:
    """Costs are measured here."""


def prepared(config: RunConfig) -> tuple[RunConfig, Any, Any]:
    teacher = load_teacher(config.teacher.model)
    config = resolve_run_defaults(config, 1, teacher)
    return config, teacher, make_sources(config.data, own_prompts=teacher.own_prompts, seed=config.run.seed)


def cost_of(config: RunConfig) -> Cost:
    config, teacher, sources = prepared(config)
    return estimate_cost(config, teacher, sources, torch.device("cpu"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_the_disk_lines_cover_what_a_run_writes(kind: str, train_settings: dict[str, Any], tmp_path: Path) -> None:
    own = {"student.kind": kind, "student.rank": 16, "run.validate_every": 2, "run.validation_prompts": ("a", "b")}
    own |= {"data.cache_dir": str(tmp_path / "cache"), "run.output": str(tmp_path / "run")}
    config = resolve({}, {**train_settings, **own, "optim.max_train_steps": 4, "run.checkpoint_every": 1})
    items = {item.name: item for item in cost_of(config).items}
    folder = distill(config)
    written = {"checkpoints": size(folder / "checkpoints"), "cached latents": size(cache_root(config.data) / "latents")}
    result = "lora" if kind == "lora" else "pipeline"
    written[result] = sum(path.stat().st_size for path in (folder / result).rglob("*.safetensors"))
    for name, found in written.items():
        assert items[name].size == pytest.approx(found, rel=0.25), name
    assert items["checkpoints"].extra > 0  # a third one while it is written
    pictures = items.pop("validation grids, report").size
    assert sum(item.size for item in items.values()) == pytest.approx(
        sum(written.values()) + size(tmp_path / "cache" / "evaluation"), rel=0.25
    )
    assert pictures > size(folder / "samples")
    again = {item.name: item for item in cost_of(config).items}
    assert again["cached latents"].size == 0
    assert "12 are ready" in again["cached latents"].note
    assert again["checkpoints"].needed < 0.6 * items["checkpoints"].needed


def test_the_time_lines_cover_every_phase(speed_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**own: Any) -> dict[str, float]:
        settings = {**speed_settings, **{key.replace("__", "."): value for key, value in own.items()}}
        config, teacher, _ = prepared(resolve({}, settings))
        generated = "teacher" in config.data.sources
        samples = [SourceSamples(generated, 100, 20)]
        rates = Rates(forward=1, backward=2, update=0.5, encode=3, decode=4, caption=0)
        return {phase.name: phase.seconds for phase in phases(config, teacher, samples, rates, written=300e6)}

    own = {"run__validate_every": 2, "run__validation_prompts": ("a", "b", "c"), "optim__max_train_steps": 4}
    own |= {"optim__batch_size": 2, "optim__gradient_accumulation_steps": 3}
    found = names(**own)
    assert list(found) == ["encoding latents", "reference images", "training", "validation", "writing the result"]
    assert found["encoding latents"] == 80 * 3
    assert found["reference images"] == 3 * (50 * 2 + 4)
    assert found["training"] == 4 * (6 * (2 + 1 + 3) + 0.5)
    assert found["validation"] == pytest.approx(3 * 3 * (15 + 4 * 4), rel=0.01)
    assert found["writing the result"] == pytest.approx(3.0)
    generated = names(**own, data__sources=("teacher",), data__teacher_steps=10)
    assert generated["generating latents"] == 80 * 10 * 2
    assert list(names(run__validate_every=0)) == ["encoding latents", "training", "writing the result"]
    cached = names(run__validate_every=0, data__teacher_cache_samples=2)
    assert cached["caching teacher outputs"] == 100 * 2 * 2
    assert cached["training"] < names(run__validate_every=0)["training"]
    monkeypatch.setattr(cost_time, "checkpoints", lambda folder: [folder / "step-00000002"])
    resumed = names(**own)
    assert "reference images" not in resumed
    assert resumed["training"] == 2 * (6 * (2 + 1 + 3) + 0.5)


def test_what_follows_a_phase_or_a_source_is_estimated() -> None:
    samples = [SourceSamples(True, 100, 0), SourceSamples(False, 40, 10), SourceSamples(False, 90, 0)]
    seconds = [40.0, 12.0, 3.0, 20.0, 5.0, 2.0]
    names = [GENERATING, ENCODING, REFERENCES, TRAINING, VALIDATION, WRITING]
    each: Any = [Phase(name, value) for name, value in zip(names, seconds, strict=True)]
    cost = Cost(needed=None, samples=samples, phases=each, items=(), passes=1.0)  # pyright: ignore[reportArgumentType]
    assert [cost.after_source(i) for i in range(3)] == [42.0, 39.0, 30.0]
    assert [cost.after(name) for name in (REFERENCES, TEACHER_OUTPUTS, TRAINING, WRITING)] == [27.0, 27.0, 7.0, 0]


def test_the_time_left_has_the_validations_and_the_result_in_it() -> None:
    left = TimeLeft(resolve({}, {"optim.max_train_steps": 10, "run.validate_every": 4}), validation=3.0, writing=2.0)
    assert left.seconds(1, per_step=0.5) == 4.5 + 3 * 3 + 2
    assert left.seconds(4, per_step=0.5) == 3.0 + 3 * 3 + 2  # that of step 4 is still ahead
    assert left.seconds(5, per_step=0.5) == 2.5 + 2 * 3 + 2
    assert left.seconds(10, per_step=0.5) == 3 + 2


def test_a_resumed_run_counts_what_is_left(train_run: Runner, train_settings: dict[str, Any]) -> None:
    folder = train_run(optim__max_train_steps=2, run__checkpoint_every=2)
    config = resolve({}, {**train_settings, "run.output": str(folder), "optim.max_train_steps": 6})
    cost = cost_of(config)
    training = next(phase for phase in cost.phases if phase.name == "training")
    assert training.note.startswith("4 steps of ")


def test_a_dry_run_counts_all_that_is_trained(
    train_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve({}, {**train_settings, "run.output": str(tmp_path / "run"), "optim.max_train_steps": 1})
    preflight.dry_run(config)
    output = capsys.readouterr().out
    distill(config)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    trained = sum(value.numel() for value in load_file(saved / "student.safetensors").values())
    assert f"a full network, trains {trained:,}\n" in output
    log = (tmp_path / "run" / "log.txt").read_text()
    for line in ("teacher: ", "training: 1 step (batch", "time, estimated", "disk: ", "memory, estimated"):
        assert line in output
        assert line in log, line


def test_a_dry_run_of_several_processes_reports_once(
    train_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve({}, {**train_settings, "run.output": str(tmp_path / "run")})
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "1")
    preflight.dry_run(config)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    preflight.dry_run(config)
    assert "(batch 4 x 1 accumulated x 8 processes)" in capsys.readouterr().out


def test_a_run_that_the_disk_cannot_hold_stops_before_it_writes(
    train_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve({}, {**train_settings, "run.output": str(tmp_path / "run")})
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    for start in (distill, preflight.dry_run):
        with pytest.raises(
            UsageError, match=r"the run writes .* to the disk of .*checkpoints .*1 kB free; free some space"
        ):
            start(config)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("steps", "warned"), [(100, False), (1000, True)])
def test_many_passes_over_the_data_are_warned_of(
    train_settings: dict[str, Any], steps: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config, teacher, sources = prepared(resolve({}, {**train_settings, "optim.max_train_steps": steps}))
    cost = estimate_cost(config, teacher, sources, torch.device("cpu"))
    log_summary(config, teacher, cost, None)
    output = capsys.readouterr().out
    passes = steps * config.optim.batch_size / 12
    assert f": {passes:.1f} passes over 12 samples" in output
    assert bool(re.search(r"warning: each sample is visited \d+ times", output)) == warned


def test_the_samples_of_a_source_are_those_that_can_be_used(train_settings: dict[str, Any]) -> None:
    config, teacher, sources = prepared(resolve({}, train_settings))
    assert samples_of(sources, config, teacher) == [SourceSamples(False, 12, 0)]
    half = SourceReport(kept=6, rejected=(("no image", 6),))
    assert samples_of(sources, config, teacher, [half]) == [SourceSamples(False, 6, 0)]


def test_reading_photos_is_part_of_encoding_them(
    train_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, teacher, sources = prepared(resolve({}, train_settings))
    now, check = [0.0], cost_time.check_sample

    def slow(*arguments: Any) -> Any:
        now[0] += 0.25
        return check(*arguments)

    monkeypatch.setattr(runtime, "clock", lambda: now[0])
    monkeypatch.setattr(cost_time, "check_sample", slow)
    found = with_read_seconds(samples_of(sources, config, teacher), sources, config.data, teacher)
    assert (found, now) == ([SourceSamples(False, 12, 0, read=0.25)], [8 * 0.25])
    rates = Rates(forward=1, backward=2, update=0.5, encode=3, decode=4, caption=0)
    assert phases(config, teacher, found, rates, written=0)[0].seconds == 12 * 3.25
    assert with_read_seconds([SourceSamples(False, 12, 12)], sources, config.data, teacher)[0].read == 0


def test_shards_are_counted_by_looking_at_all_of_them(
    train_settings: dict[str, Any], tmp_path: Path, small_teacher: Path
) -> None:
    word = str(write_tar(tmp_path / "a.tar", [("0.jpg", b""), ("0.txt", b"a cat")]))
    config = resolve({}, {**train_settings, "data.sources": (word,), "data.max_samples": 500})
    sources, teacher = make_sources(config.data), load_teacher(str(small_teacher))
    assert samples_of(sources, config, teacher) == [SourceSamples(False, 500, 0)]
    whole = SourceReport(kept=3, rejected=(("no image", 1),))
    assert samples_of(sources, config, teacher, [whole]) == [SourceSamples(False, 3, 0)]
    assert samples_of(sources, config, teacher, [replace(whole, complete=False)]) == [SourceSamples(False, 375, 0)]


def test_nothing_but_the_student_moves_while_rates_are_measured(train_settings: dict[str, Any]) -> None:
    config, teacher, sources = prepared(resolve({}, train_settings))
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    estimate_cost(config, teacher, sources, torch.device("cpu"))
    assert all(torch.equal(before[name], value) for name, value in teacher.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_device_without_room_for_a_pass_leaves_the_time_out(
    train_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, teacher, sources = prepared(resolve({}, train_settings))
    monkeypatch.setattr(summary, "measure_rates", Mock(side_effect=torch.OutOfMemoryError))
    cost = estimate_cost(config, teacher, sources, torch.device("cpu"))
    log_summary(config, teacher, cost, None)
    output = capsys.readouterr().out
    assert "time: not estimated" in output
    assert "time, estimated" not in output
    assert "disk: " in output
