"""Training runs: what they compute, what they leave behind, and how they are interrupted, resumed and refused."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lcmdistill.config.schema import OptimConfig
from lcmdistill.config.toml import read_toml
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, TeacherNetwork
from lcmdistill.objectives import lcm
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.training.optimizer import learning_rate_at
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.runs import distill, resolve
from tests.support.training import VALUES, Runner, assert_same, losses, metrics

# Recorded when the layers below were proven; a refactoring that moves them has changed what is computed.
GOLDEN_LOSS = [0.2605933, 0.1834835, 0.1307859, 0.2627895, 0.1708090, 0.0708354]

GOLDEN_NORM = [3.564842, 3.390724, 2.076547, 3.557505, 2.774616, 0.911940]


def test_the_loss_curve_is_the_golden_one(train_run: Runner) -> None:
    folder = train_run(
        optim__max_train_steps=6,
        optim__gradient_accumulation_steps=2,
        optim__learning_rate=1e-4,
        data__caption_drop=0.2,
        data__flip=True,
    )
    assert losses(folder) == pytest.approx(GOLDEN_LOSS, rel=1e-3)
    assert [line["grad_norm"] for line in metrics(folder)] == pytest.approx(GOLDEN_NORM, rel=1e-3)


def test_accumulated_micro_batches_are_one_batch(train_run: Runner) -> None:
    whole = train_run("whole", optim__batch_size=8, optim__learning_rate=1e-4)
    halves = train_run("halves", optim__batch_size=4, optim__gradient_accumulation_steps=2, optim__learning_rate=1e-4)
    for key in ("loss", "grad_norm"):
        found, expected = [m[key] for m in metrics(halves)], [m[key] for m in metrics(whole)]
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found == pytest.approx(expected, rel=5e-4)  # Adam makes rounding grow: it divides by the gradient's size


def test_recomputed_activations_give_the_same_gradients(train_run: Runner) -> None:
    plain = train_run("plain", optim__learning_rate=1e-4)
    saving = train_run("saving", optim__learning_rate=1e-4, run__gradient_checkpointing=True)
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in metrics(saving)] == pytest.approx([m[key] for m in metrics(plain)], rel=1e-5)


@pytest.fixture
def gradient_norms() -> Iterator[list[float]]:
    """The norm of the gradients that each optimiser step is given."""
    norms: list[float] = []

    def note(optimizer: Any, args: Any, options: Any) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))

    handle = register_optimizer_step_pre_hook(note)
    yield norms
    handle.remove()


@pytest.mark.parametrize("limit", [1.0, 0.01, 0.0])
def test_clipping_clips_what_the_optimiser_gets(train_run: Runner, gradient_norms: list[float], limit: float) -> None:
    folder = train_run(optim__max_grad_norm=limit, optim__learning_rate=1e-6, optim__max_train_steps=2)
    norms = [line["grad_norm"] for line in metrics(folder)]
    assert max(norms) > 0.1  # so that there is something to clip
    expected = [min(norm, limit) if limit else norm for norm in norms]
    assert gradient_norms == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    optim = OptimConfig(learning_rate=2.0, max_train_steps=8, warmup_steps=4, lr_scheduler=schedule)
    assert [learning_rate_at(step, optim) / 2.0 for step in range(8)] == pytest.approx(expected)


def test_a_run_uses_and_logs_its_learning_rates(train_run: Runner) -> None:
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda opt, args, options: rates.append(opt.param_groups[0]["lr"]))
    folder = train_run(optim__lr_scheduler="cosine", optim__warmup_steps=2)
    handle.remove()
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert [line["learning_rate"] for line in metrics(folder)] == rates


def test_the_loss_is_logged_by_noise_level(train_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logged losses by noise level add up to the loss, and stand at the times that were sampled."""
    times: list[Tensor] = []
    draw = lcm.sample_times

    def noting(*args: Any) -> Any:
        times.append(draw(*args)[0])
        return draw(*args)

    monkeypatch.setattr(lcm, "sample_times", noting)
    folder = train_run(
        run__log_every=2, optim__max_train_steps=3, optim__batch_size=8, optim__gradient_accumulation_steps=2
    )
    first, last = metrics(folder)
    drawn = [torch.cat(times[i : i + 4]) for i in (0, 4)]
    for line, t in ((first, drawn[0]), (last, drawn[1])):
        assert len(line["loss_by_noise"]) == 10
        counts = torch.bincount(t // 100, minlength=10).tolist()
        assert [value is None for value in line["loss_by_noise"]] == [count == 0 for count in counts]
        total = sum(v * n for v, n in zip(line["loss_by_noise"], counts, strict=True) if n)
        assert total / len(t) == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.15, 0.45), (1.0, 1.0, 1.0)])
def test_captions_are_dropped_at_their_rate(
    train_run: Runner, monkeypatch: pytest.MonkeyPatch, share: float, low: float, high: float
) -> None:
    dropped: list[bool] = []
    teacher_step = LatentConsistency.teacher_step

    def noting(self: LatentConsistency, teacher: TeacherNetwork, schedule: Any, batch: Batch, rng: Rng) -> Any:
        dropped.extend((batch.cond["prompt_embeds"] == teacher.null["prompt_embeds"]).all(-1).all(-1).tolist())
        return teacher_step(self, teacher, schedule, batch, rng)

    monkeypatch.setattr(LatentConsistency, "teacher_step", noting)
    train_run(data__caption_drop=share, optim__batch_size=24, optim__max_train_steps=2)
    assert len(dropped) == 2 * 24
    assert low <= sum(dropped) / len(dropped) <= high


def test_the_target_is_the_student_s_moving_average(train_run: Runner) -> None:
    folder = train_run(optim__max_train_steps=1, objective__ema_decay=0.75, run__checkpoint_every=1)
    (last,) = checkpoints(folder / "checkpoints")
    student, target = (load_file(last / f"{name}.safetensors") for name in ("student", "target"))
    frozen = train_run("frozen", optim__max_train_steps=1, optim__learning_rate=0.0)
    start = load_file(checkpoints(frozen / "checkpoints")[-1] / "student.safetensors")
    for name, value in student.items():
        torch.testing.assert_close(target[name], 0.75 * start[name] + 0.25 * value)


def test_a_run_neither_reads_nor_changes_global_random_state(train_run: Runner, plain_run: Path) -> None:
    state = torch.get_rng_state()
    torch.rand(7)
    moved = torch.get_rng_state()
    assert_same(train_run(), plain_run)
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)


def test_seeds_differ(train_run: Runner, plain_run: Path) -> None:
    assert losses(plain_run) != losses(train_run(run__seed=1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_on_the_cpu(train_run: Runner, plain_run: Path, precision: str) -> None:
    exact = losses(plain_run)
    half = losses(train_run(precision, run__precision=precision))
    assert half == pytest.approx(exact, rel=0.2)
    assert half != exact


def test_a_run_writes_everything_that_is_promised(train_run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_run(
        optim__max_train_steps=5,
        run__validate_every=2,
        run__checkpoint_every=1,
        run__keep_checkpoints=3,
        run__validation_prompts=("grinning face", "red heart"),
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        ".data.json",
        ".finished",
        ".requested.json",
        "README.md",
        "captions.json",
        "card.json",
        "checkpoints",
        "config.toml",
        "log.txt",
        "metrics.jsonl",
        "pipeline",
        "report.html",
        "samples",
    ]
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert [name for name in kept if name != "best"] == [f"step-{i:08d}" for i in (3, 4, 5)]
    assert [path.name for path in sorted((folder / "samples").glob("step-*"))] == [
        f"step-{i:06d}.png" for i in (0, 2, 4, 5)
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained, validated = ([line for line in lines if ("loss" in line) == wanted] for wanted in (True, False))
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5]
    profiled = ("seconds_", "peak_memory_gib", "mfu")
    assert all(
        {k for k in line if not k.startswith(profiled)} == {*VALUES, "loss_by_noise", "checksum"} for line in trained
    )
    assert [line["step"] for line in validated] == [0, 2, 4, 5]
    measures = ("rmse", "ssim", "sharpness", "saturation", "diversity")
    names = {"step", "checksum", *(f"val/{m}_{n}" for m in measures for n in (1, 2, 4, 8))}
    assert all(set(line) == names for line in validated)
    card = (folder / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "pipeline_tag: text-to-image" in card
    assert "![Validation grid](samples/step-000005.png)" in card
    assert f"lcmdistill sample {folder.name}" in card
    assert str(folder.parent) not in card  # which is of this machine
    output = capsys.readouterr().out
    assert "12 kept, 0 dropped" in output
    assert re.search(
        r"step 5/5  loss \d\.\d+  [\d.]+ samples/s  MFU \d+%  left [\d.]+ s", output
    )  # a validation is to come


def test_the_recorded_configuration_is_resolved_and_starts_the_same_run(plain_run: Path, tmp_path: Path) -> None:
    again = distill(resolve(read_toml(plain_run / "config.toml"), {"run.output": str(tmp_path / "again")}))
    assert_same(plain_run, again)


def test_nothing_is_generated_without_validation(train_run: Runner) -> None:
    assert list((train_run(run__validate_every=0) / "samples").iterdir()) == []


def test_tensorboard_gets_the_numbers_and_the_grids(train_run: Runner) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_run(run__report_to="tensorboard", run__validate_every=2, run__validation_prompts=("red heart",))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(folder))
    assert [event.step for event in events.Images("val/grid")] == [0, 2, 4]
    assert [event.step for event in events.Scalars("val/ssim_4")] == [0, 2, 4]


def test_a_tracker_that_is_not_installed_says_how_to_get_it(train_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=re.escape("--report-to wandb needs: pip install 'lcmdistill[wandb]'")):
        train_run(run__report_to="wandb")


def test_a_line_of_metrics_has_the_seconds_of_each_phase(train_run: Runner) -> None:
    folder = train_run(run__validate_every=2, run__validation_prompts=("red heart",))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        phases = {key.removeprefix("seconds_"): value for key, value in line.items() if key.startswith("seconds_")}
        assert {"data", "teacher", "target", "forward", "backward", "optimizer", "other"} <= phases.keys()
        assert min(phases.values()) >= 0
        assert line["mfu"] > 0
        assert line["peak_memory_gib"] > 0
    log = (folder / "log.txt").read_text()
    assert "mfu is relative to" in log
    assert "step 4/4" in log
