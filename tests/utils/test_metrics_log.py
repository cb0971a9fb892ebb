"""The log of metrics, trackers, and progress bars."""

import io
import json
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from lcmdistill.utils import atomic as checkpoint
from lcmdistill.utils.metrics_log import Metrics, read_metrics


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
