"""Training runs: what they compute, what they leave behind, and how they are interrupted, resumed and refused."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill import cli
from lcmdistill.export import registry as product
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training import trainer as train
from lcmdistill.training.validation import Validator
from lcmdistill.utils.checkpoint import load_best
from lcmdistill.utils.errors import Interrupted, RunError, UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.training import Runner, assert_same, kill_run, losses, metrics, result


@contextmanager
def signalled(step: int, number: int) -> Iterator[None]:
    """This process is sent a signal in the middle of a step."""
    take, count = torch.optim.AdamW.step, [0]

    def step_then_signal(self: Any, *args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return take(self, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step_then_signal)
        yield


def test_two_and_two_steps_are_four(train_run: Runner, plain_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = train_run("parts", optim__max_train_steps=2)
    assert len(losses(parts)) == 2
    capsys.readouterr()
    train_run("parts")
    assert "resuming from step-00000002" in capsys.readouterr().out
    assert_same(parts, plain_run)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_the_same_command_ends_where_it_would_have(
    train_run: Runner,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
) -> None:
    changes = {"optim__max_train_steps": 6, "optim__lr_scheduler": "cosine", "optim__warmup_steps": 2}
    changes |= {"run__log_every": 4}  # the signal comes between two lines of metrics
    whole = train_run("whole", **changes)
    config = tmp_path / "config.toml"
    config.write_bytes((whole / "config.toml").read_bytes())
    arguments = ["lcmdistill", "distill", "--config", str(config), "--output", str(tmp_path / "cut")]
    monkeypatch.setattr(sys, "argv", arguments)
    with signalled(3, getattr(signal, name)), pytest.raises(SystemExit) as ended:
        cli.main()
    output = capfd.readouterr()
    assert ended.value.code == code
    assert [line for line in output.err.splitlines() if line] == [
        "stopping at the next safe point; press Ctrl-C again to stop immediately",
        "stopped at step 3, which is saved; re-run the same command to resume",
    ]
    assert not (tmp_path / "cut" / "pipeline").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert_same(tmp_path / "cut", whole)


def test_a_signal_while_the_data_are_prepared_ends_the_run_in_one_sentence(
    train_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcmdistill.teachers.base import Teacher

    encode = Teacher.encode_images

    def signal_then_encode(self: Teacher, pixels: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    monkeypatch.setattr(Teacher, "encode_images", signal_then_encode)
    with pytest.raises(Interrupted, match="progress is saved") as caught:
        train_run()
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_a_killed_run_ends_bit_for_bit_where_it_would_have(train_run: Runner, tmp_path: Path) -> None:
    """kill -9 between two checkpoints, in the middle of whatever it is doing."""
    changes = {"optim__max_train_steps": 12, "run__checkpoint_every": 3, "run__log_every": 1}
    whole = train_run("whole", **changes)
    config = (whole / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config)
    killed = tmp_path / "killed"
    kill_run(tmp_path / "config.toml", killed, "step 4/12")
    assert 0 < len(metrics(killed)) < 12
    assert not (killed / "pipeline").exists()
    train_run("killed", **changes)
    assert_same(killed, whole)


def test_the_weights_of_the_best_validation_are_kept(train_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is pruned, and however much worse the run gets afterwards."""
    weights: dict[int, dict[str, Tensor]] = {}
    draw = Validator.draw

    def noting(self: Validator, step: int, network: Any, metrics: Any) -> Any:
        weights[step] = {name: value.clone() for name, value in network.named_parameters()}
        return draw(self, step, network, metrics)

    monkeypatch.setattr(Validator, "draw", noting)
    options = {"run__validate_every": 1, "run__validation_prompts": ("red heart", "apple"), "run__keep_checkpoints": 1}
    folder = train_run(**options, run__best_metric="rmse_2", optim__max_train_steps=6, optim__learning_rate=3e-2)
    values = {line["step"]: line["val/rmse_2"] for line in metrics(folder) if "val/rmse_2" in line}
    expected = min((step for step in values if step), key=lambda step: values[step])
    found = load_best(folder)
    if values[expected] < values[0]:
        assert found is not None
        assert found[0] == expected
        assert all(torch.equal(value, weights[expected][name]) for name, value in found[1].items())
    else:  # it never got better than it began
        assert found is None


def test_the_images_before_training_are_generated_once(
    train_run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    latents = Validator._latents

    def noting(self: Validator, pipeline: Any, steps: int) -> Any:
        asked.append(steps)
        return latents(self, pipeline, steps)

    monkeypatch.setattr(Validator, "_latents", noting)
    options = {"run__validate_every": 1, "run__validation_prompts": ("red heart",), "optim__max_train_steps": 1}
    options |= {"data__cache_dir": str(tmp_path / "cache")}
    first = train_run("first", **options)
    assert asked == [1, 2, 4, 8] * 2
    again = train_run("again", **options)
    assert len(asked) == 8 + 4
    assert_same(first, again)
    for name in ("samples/step-000000.png", "samples/step-000001.png"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert metrics(again)[0]["val/rmse_4"] > 0
    for left in (9,):  # bytes, as a full disk or a power cut may leave them
        for path in (tmp_path / "cache" / "evaluation").glob("beginning-*/*"):
            path.write_bytes(path.read_bytes()[:left])
        asked.clear()
        assert_same(first, train_run(f"damaged-{left}", **options))
        assert len(asked) == 8
    for n, other in enumerate(({"run__seed": 7}, {"run__validation_guidance_scale": 2.0})):
        asked.clear()
        train_run(f"other-{n}", **options, **other)
        assert asked == [1, 2, 4, 8] * 2


def test_a_validation_that_a_signal_cut_off_is_made_up_for(train_run: Runner) -> None:
    options = {"run__validate_every": 2, "run__validation_prompts": ("red heart",)}
    whole = train_run("whole", **options)
    with signalled(2, signal.SIGTERM), pytest.raises(Interrupted, match="stopped at step 2"):
        train_run("cut", **options)
    assert [line["step"] for line in metrics(train_run("cut", **options)) if "loss" not in line] == [0, 2, 4]
    mine, its = ({json.dumps(line) for line in metrics(whole.parent / name)} for name in ("whole", "cut"))
    assert mine == its


def test_a_finished_run_is_left_alone_and_says_so(train_run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_run(run__validate_every=2, run__validation_prompts=("red heart",))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    for steps, sentence in (
        (4, "nothing to do"),
        (3, "is already finished with 4 steps and keeps them; for a run of 3"),
    ):
        train_run(run__validate_every=2, run__validation_prompts=("red heart",), optim__max_train_steps=steps)
        assert sentence in capsys.readouterr().out
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_that_ended_without_its_pipeline_writes_it(
    train_run: Runner, plain_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(product, "save_pipeline", full)
        with pytest.raises(OSError, match="No space left"):
            train_run("cut")
    assert_same(train_run("cut"), plain_run)


def test_a_run_that_was_killed_before_its_last_removal_keeps_no_extra_checkpoint(train_run: Runner) -> None:
    run = train_run(run__keep_checkpoints=1)
    (last,) = checkpoints(run / "checkpoints")
    shutil.copytree(last, last.with_name("step-00000002"))
    shutil.copytree(last, last.with_name(".step-00000001.removed"))
    (run / ".finished").unlink()
    train_run(run__keep_checkpoints=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [last.name]


def test_a_pipeline_that_was_deleted_is_written_again(train_run: Runner, plain_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain_run, tmp_path / "run")
    before = result(folder)
    shutil.rmtree(folder / "pipeline")
    train_run()
    assert result(folder) == before


def test_dates_do_not_tell_whether_a_run_has_finished(
    train_run: Runner, plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(plain_run, tmp_path / "run")
    for path in folder.rglob("*.pt"):
        os.utime(path, (2e9, 2e9))
    capsys.readouterr()
    train_run()
    assert "nothing to do" in capsys.readouterr().out


def test_a_first_attempt_that_failed_decides_nothing_for_the_next(
    train_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RunError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(LatentConsistency, "loss", fail)
        with pytest.raises(RunError, match="no luck"):
            train_run(optim__max_train_steps=4)
    folder = train_run(optim__max_train_steps=40, run__checkpoint_every=40)
    assert (
        "\nmax_samples = 256\n" in (folder / "config.toml").read_text()
    )  # 160 samples in whole chunks; 4 steps need 128


def test_a_run_is_not_resumed_on_other_data(train_run: Runner, image_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    folder = train_run(data__sources=(str(data),))
    before = result(folder)
    (data / "new.webp").write_bytes((data / "00.webp").read_bytes())
    with pytest.raises(
        UsageError, match=r"--data .*data changed \(names, sizes, dates\) since the run in .*run started; restore it"
    ):
        train_run(data__sources=(str(data),), optim__max_train_steps=6)
    assert result(folder) == before
    assert "max_train_steps = 4\n" in (folder / "config.toml").read_text()
    (data / "new.webp").unlink()
    train_run(data__sources=(str(data),), optim__max_train_steps=6)


def test_a_signal_while_the_teacher_is_loaded_ends_the_run_before_it_begins(
    train_run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_then_signal(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return load_teacher(*args, **options)

    monkeypatch.setattr(train, "load_teacher", load_then_signal)
    with pytest.raises(Interrupted, match="before training started"):
        train_run()
    assert not (tmp_path / "run").exists()


def test_a_longer_run_writes_a_new_pipeline(train_run: Runner, plain_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain_run, tmp_path / "run")
    before = (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    train_run(optim__max_train_steps=6)
    assert (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim__learning_rate": 2e-3}, "optim.learning_rate"),
        ({"optim__batch_size": 2}, "optim.batch_size"),
        ({"objective__w_max": 6.0}, "objective.w_max"),
        ({"run__seed": 1}, "run.seed"),
        ({"data__resolution": 32}, "data.resolution"),
        ({"data__caption_drop": 0.5}, "data.caption_drop"),
        ({"data__max_samples": 3}, "data.max_samples"),
        ({"student__omega_init": "random"}, "student.omega_init"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    train_run: Runner, plain_run: Path, changes: dict[str, Any], key: str
) -> None:
    before = (plain_run / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=re.escape(f"{plain_run} contains a run with {key} = ")):
        train_run(str(plain_run), optim__max_train_steps=6, **changes)
    assert (plain_run / "config.toml").read_bytes() == before


@pytest.mark.parametrize(("line", "kept"), [("holdout = 0.2\n", "holdout = 0.2\n"), ("", "holdout = 0.0\n")])
def test_a_resumed_run_holds_out_the_share_that_it_was_started_with(
    train_run: Runner, plain_run: Path, tmp_path: Path, line: str, kept: str
) -> None:
    """A version without the setting trained on every sample."""
    config = shutil.copytree(plain_run, tmp_path / "run") / "config.toml"
    text = config.read_text().replace("holdout = 0.05\n", line)
    config.write_text(f"{text.rpartition('#')[0]}# checksum: any\n")
    train_run(optim__max_train_steps=5)
    assert kept in config.read_text()


def test_a_schedule_with_an_end_cannot_be_made_longer(train_run: Runner) -> None:
    train_run(optim__lr_scheduler="linear")
    with pytest.raises(UsageError, match=r"contains a run with optim\.max_train_steps = 4 \(this command: 6\)"):
        train_run(optim__lr_scheduler="linear", optim__max_train_steps=6)


@pytest.mark.parametrize("left", [[".lock"], [".lock", "log.txt"], [".config.partial.toml"]], ids="+".join)
def test_a_run_that_was_killed_at_its_very_start_starts_again(
    train_run: Runner, left: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir(exist_ok=True)
    for name in left:
        (tmp_path / "run" / name).touch()
    assert (train_run() / "pipeline" / "model_index.json").is_file()
