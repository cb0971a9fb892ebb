"""Training runs: what they compute, what they leave behind, and how they are interrupted, resumed and refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.run_settings import check_run, resolve_run_defaults
from lcmdistill.utils.errors import UsageError
from tests.support.runs import resolve
from tests.support.training import Runner, assert_same, losses


def test_what_changes_no_result_may_differ(train_run: Runner) -> None:
    whole = train_run("whole")
    parts = train_run("parts", optim__max_train_steps=2)
    train_run("parts", run__checkpoint_every=3, run__keep_checkpoints=5, run__device="cpu")
    assert_same(parts, whole)


@pytest.mark.parametrize("content", [None, "a = 1\n", "[tool]\nx = 1\n", "no toml ["])
def test_a_foreign_folder_is_refused(train_run: Runner, tmp_path: Path, content: str | None) -> None:
    name = "thesis.txt" if content is None else "config.toml"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(content or "hello")
    with pytest.raises(UsageError, match="contains files that are not from lcmdistill"):
        train_run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_file_as_output_is_refused(train_run: Runner, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("hello")
    with pytest.raises(UsageError, match="is a file; specify a folder"):
        train_run()


def test_an_empty_folder_is_fine(train_run: Runner, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert len(losses(train_run())) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__resolution": 15},
            r"data\.resolution is 15; it must be a multiple of 8 \(the VAE's factor is 2.*; try 16",
        ),
        ({"objective__skip": 1000}, r"objective\.skip \(k\) is 1000; it must be from 1 to 999"),
        ({"objective__w_min": 6.0}, r"objective\.w_min is 6.0, above objective\.w_max, 5.0"),
        (
            {"objective__solver": "rk4"},
            r"objective\.solver is 'rk4'; choose from ddim, euler, heun, dpm-solver, dpm-sol",
        ),
        ({"teacher__model": "no-such-teacher"}, "there is no model 'no-such-teacher'"),
        ({"run__output": "/proc/x"}, r"--output /proc/x is not writable"),
    ],
)
def test_impossible_settings_are_refused_and_leave_no_folder(
    train_run: Runner, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train_run(**changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recorded", "steps", "samples"),
    [
        (128, 4, 128),
        (128, 40, 256),  # 40 steps of 4 samples, in whole chunks
        (128, 2, 128),
        (100, 40, 100),  # a number that was chosen
    ],
)
def test_a_longer_run_has_more_samples(
    train_settings: dict[str, Any], plain_run: Path, tmp_path: Path, recorded: int, steps: int, samples: int
) -> None:
    folder = shutil.copytree(plain_run, tmp_path / "run")
    text = (folder / "config.toml").read_text()
    assert "max_samples = 128\n" in text
    text = text.replace("max_samples = 128\n", f"max_samples = {recorded}\n")
    (folder / "config.toml").write_text(f"{text}# checksum: any\n")
    config = resolve({}, {**train_settings, "run.output": str(folder), "optim.max_train_steps": steps})
    config = resolve_run_defaults(config, 1, load_teacher(config.teacher.model))
    assert config.data.max_samples == samples
    check_run(config)
