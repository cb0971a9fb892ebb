"""The log of metrics, trackers, and progress bars."""

import io
import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from lcmdistill.utils import atomic as checkpoint
from lcmdistill.utils.metrics_log import Metrics, missing_metrics, read_metrics


def test_metrics_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 3}\n{"step": 4, "lo')
    Metrics(tmp_path, "none", {}, 2).log(3, {"loss": 4.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_damaged_lines_and_values_are_ignored(tmp_path: Path) -> None:
    good = '{"step": 1, "loss": 1.0, "loss_by_noise": [1.0, null]}'
    damaged = ['{"step": "x"}', "[]", "3", '{"st', '{"step": true}', '{"step": 2, "loss": [], "loss_by_noise": 3}']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([good, *damaged]).encode() + b"\n\xff\n")
    assert read_metrics(tmp_path) == [json.loads(good), {"step": 2}]
    Metrics(tmp_path, "none", {}, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == good + "\n"


def test_a_changed_digit_of_a_line_is_noticed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Metrics(tmp_path, "none", {}, step).log(step, {"loss": step / 8}, loss_by_noise=[0.5, None])
    path = tmp_path / "metrics.jsonl"
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.125, 0.25, 0.375]
    assert missing_metrics(tmp_path, 3, 1) == []
    text = path.read_text()
    for damaged in (
        text.replace("0.25", "0.35"),
        text.replace('"step": 2', '"step": "2"'),
        text.replace('2, "loss', ""),
    ):
        path.write_text(damaged)
        assert [line["loss"] for line in read_metrics(tmp_path)] == [0.125, 0.375]
        assert missing_metrics(tmp_path, 3, 1) == [f"{path}: 1 of 3 lines cannot be read, and are left out"]


def test_metrics_that_are_gone_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n')
    assert missing_metrics(tmp_path, 4, 4) == []
    assert missing_metrics(tmp_path, 4, 2) == [
        f"{path} ends at step 1, and the run has 4 steps: its curves are incomplete"
    ]
    path.unlink()
    assert missing_metrics(tmp_path, 4, 2) == [f"{path} is missing, and the run has 4 steps: its curves are incomplete"]
    assert missing_metrics(tmp_path, 0, 2) == []


def test_the_metrics_file_is_complete_whenever_the_program_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n')
    monkeypatch.setattr(checkpoint, "_sync", raising := Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Metrics(tmp_path, "none", {}, 2)
    assert raising.called
    assert path.read_text() == '{"step": 1, "loss": 1}\n'


def test_wandb_recognizes_a_run_by_its_unique_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Mock(__spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for parent in ("a", "a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True, exist_ok=True)
        Metrics(tmp_path / parent / "run", "wandb", {}, 0)
    first, again, other = (call.kwargs["id"] for call in wandb.init.call_args_list)
    assert first == again != other


def test_wandb_s_own_variables_decide_and_its_chatter_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = Mock(__spec__=True)
    wandb.init.return_value.url = "https://wandb.example/run"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    Metrics(tmp_path, "wandb", {}, 0)
    for name, value in (("PROJECT", "ablation"), ("NAME", "k=20"), ("RUN_ID", "abc"), ("DIR", "/scratch")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "other").mkdir()
    metrics = Metrics(tmp_path / "other", "wandb", {"optim.beta1": 0.9, "data.sources": ("a",)}, 0)
    usual, chosen = (call.kwargs for call in wandb.init.call_args_list)
    assert (usual["project"], usual["name"], usual["dir"]) == ("lcmdistill", tmp_path.name, str(tmp_path))
    assert {key: chosen[key] for key in ("project", "name", "id", "dir")} == {
        "project": "ablation",
        "name": "k=20",
        "id": "abc",
        "dir": "/scratch",
    }
    assert chosen["config"] == {"optim.beta1": 0.9, "data.sources": ["a"]}
    assert os.environ["WANDB_SILENT"] == "true"
    assert capsys.readouterr().out == 2 * "wandb: https://wandb.example/run\n"
    metrics.log(3, {"loss": 0.5, "learning_rate": 1e-4}, loss_by_noise=[0.1, None, 0.3, 0.4])
    metrics.log(3, {"val/rmse_4": 0.2})
    metrics.image(3, "val/grid", image := Mock())
    metrics.close()
    run = wandb.init.return_value
    logged = [call.args[0] for call in run.log.call_args_list]
    assert logged[0] == {
        "train/loss": 0.5,
        "train/learning_rate": 1e-4,
        "train/loss_by_noise/00-25%": 0.1,
        "train/loss_by_noise/50-75%": 0.3,
        "train/loss_by_noise/75-100%": 0.4,
    }
    assert logged[1] == {"val/rmse_4": 0.2}
    wandb.Image.assert_called_once_with(image)
    assert all(call.kwargs == {"step": 3} for call in run.log.call_args_list)
    run.finish.assert_called_once()


def test_tensorboard_has_settings_prefixes_noise_levels_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, "tensorboard", {"optim.beta1": 0.9, "data.sources": ("a",), "data.prompts": None}, 0)
    metrics.log(1, {"loss": 0.5}, loss_by_noise=[0.1, 0.2])
    metrics.log(1, {"val/rmse_4": 0.25})
    metrics.image(1, "val/grid", Image.new("RGB", (4, 4)))
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {"train/loss", "train/loss_by_noise/00-50%", "train/loss_by_noise/50-100%", "val/rmse_4"}
    assert set(events.Tags()["scalars"]) == scalars
    assert events.Tags()["images"] == ["val/grid"]
    assert events.Scalars("val/rmse_4")[0].value == 0.25
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert b"optim.beta1" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content


def test_a_progress_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcmdistill.utils.logging import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, visible in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        with progress("distilling", 10) as bar:
            bar.update(5, "loss 0.1")
            assert bar.visible == visible
            time.sleep(0.01)
        assert ("5/10" in stream.getvalue(), "loss 0.1" in stream.getvalue()) == (visible, visible)


def test_an_unknown_total_is_not_shown_as_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcmdistill.utils.logging import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    with progress("preparing", None) as bar:
        bar.update(5)
    assert "5" in stream.getvalue()
    assert not any(sign in stream.getvalue() for sign in ("%", "/", "left"))
