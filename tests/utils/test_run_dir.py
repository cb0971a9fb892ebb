"""The run folder: which checkpoints count, and the lock that keeps a second run out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcmdistill.utils import run_dir
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoint_step, checkpoints, run_lock
from tests.support.training import ROOT


@pytest.mark.parametrize(
    "name", ["step-00000016 (copy)", "step-16", "step-", "step-0000001x", "step-0000000016", "step-00000016.bak"]
)
def test_folders_with_other_names_are_not_checkpoints(tmp_path: Path, name: str) -> None:
    for folder in ("step-00000002", name):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "state.pt").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_checkpoints_are_sorted_by_step(tmp_path: Path) -> None:
    for name in ("step-100000000", "step-99999999"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").touch()
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [99999999, 100000000]


def test_a_second_run_in_a_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with run_lock(folder):
        with (
            pytest.raises(UsageError, match=rf"a is in use by another run \(process {os.getpid()} on .*another folder"),
            run_lock(folder),
        ):
            pass
        (folder / "config.toml").touch()
    with run_lock(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("name", [".lock", "log.txt", "metrics.jsonl"])
def test_no_file_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    """A folder of somebody else could have a run overwrite any file."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with (
        pytest.raises(UsageError, match=f"{name} is a link, and a run writes no file"),
        run_lock(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_empty_folder_is_removed_with_its_lock(tmp_path: Path) -> None:
    def refused() -> None:
        with run_lock(tmp_path / "run"):
            raise UsageError("refused")

    with pytest.raises(UsageError, match="refused"):
        refused()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        f"import os; from pathlib import Path; from lcmdistill.utils.run_dir import run_lock\n"
        f"with run_lock(Path({str(tmp_path)!r})): print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-9, "held\n")
    assert (tmp_path / ".lock").exists()
    with run_lock(tmp_path):
        pass


def test_without_locks_of_the_system_a_run_goes_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_dir.fcntl, "flock", unsupported)
    with run_lock(tmp_path / "run"):
        (tmp_path / "run" / "config.toml").touch()
    monkeypatch.setattr(run_dir, "fcntl", None)
    with run_lock(tmp_path / "run"):
        pass
