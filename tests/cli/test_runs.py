"""`lcmdistill runs` and `lcmdistill cache`, and runs by their names."""

import fcntl
import shutil
from pathlib import Path

import pytest

from lcmdistill.data.eviction import claim_folder
from lcmdistill.utils.run_names import names_a_run, near_runs, run_path
from tests.support.teachers import Command


@pytest.fixture
def runs(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder runs/ in the current one, with a finished run `mine` and a stopped one `fast`."""
    folder = tmp_path / "project" / "runs"  # with nothing beside it: the runs of other tests are beside tmp_path
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    for name in ("mine", "fast"):
        shutil.copytree(small_run, folder / name)
    (folder / "fast" / ".finished").unlink()
    (folder / "notes").mkdir()
    return folder


def test_runs_are_listed(command: Command, runs: Path) -> None:
    code, text, _ = command("runs")
    assert code == 0
    header, *rows, total = text.splitlines()
    assert header.split() == ["name", "state", "step", "best", "size", "date"]
    states = {row.split()[0]: row.split()[1:3] for row in rows}
    assert states == {"mine": ["finished", "4/4"], "fast": ["stopped", "4/4"]}
    assert all("ssim_4 at step" in row for row in rows)
    assert total.startswith("2 runs, ")
    with (runs / "mine" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = command("runs")[1]
        assert [row.split()[1] for row in text.splitlines() if row.startswith("mine")] == ["running"]
        assert "is running; stop it first" in command("runs", "remove", "mine", "--yes")[2]
    shutil.rmtree(runs)
    assert "there are no runs in runs/" in command("runs")[1]


def test_a_damaged_run_is_listed_too(command: Command, runs: Path) -> None:
    (runs / "mine" / "config.toml").write_text("[teacher]\nmodel = 1\n")
    text = command("runs")[1]
    assert [row.split()[1] for row in text.splitlines() if row.startswith("mine")] == ["damaged"]


def test_a_run_is_removed_by_its_name(command: Command, runs: Path) -> None:
    code, _, error = command("runs", "remove", "mine")
    assert code == 2
    assert error.startswith("Error: Delete runs/mine (")
    assert "add --yes" in error
    code, text, _ = command("runs", "remove", "mine", "--yes")
    assert code == 0
    assert "removed 1 run, " in text
    assert [path.name for path in sorted(runs.iterdir())] == ["fast", "notes"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("notes", "runs there: "), ("../x", "existing runs: runs/fast"), ("fats", "(did you mean runs/fast?)")],
)
def test_what_is_not_a_run_is_not_removed(command: Command, runs: Path, name: str, near: str) -> None:
    code, _, error = command("runs", "remove", name, "--yes")
    assert code == 2
    assert near in error
    assert len(list(runs.iterdir())) == 3


def test_finished_runs_lose_their_checkpoints_and_stay_finished(command: Command, runs: Path) -> None:
    assert command("runs", "clean")[0] == 2
    assert "not finished" in command("runs", "clean", "fast", "--checkpoints", "--yes")[2]
    code, text, _ = command("runs", "clean", "--checkpoints", "--yes")
    assert code == 0
    assert "removed 2 checkpoints" in text
    assert not list((runs / "mine" / "checkpoints").glob("step-*"))
    assert list((runs / "fast" / "checkpoints").glob("step-*"))
    rows = [row.split() for row in command("runs")[1].splitlines() if row.startswith("mine")]
    assert rows[0][1:3] == ["finished", "4/4"]
    assert "there are no checkpoints to delete" in command("runs", "clean", "--checkpoints")[1]


def test_a_cleaned_run_is_not_started_over(command: Command, runs: Path, small_run: Path) -> None:
    from lcmdistill.config.resolve import with_values
    from lcmdistill.objectives.recorded import require_run_config
    from lcmdistill.training.run_settings import check_run, finished

    shutil.rmtree(runs / "mine" / "checkpoints")
    config = with_values(require_run_config(runs / "mine"), {"run.output": str(runs / "mine")})
    assert finished(config)
    check_run(config)
    longer = with_values(config, {"optim.max_train_steps": 9})
    with pytest.raises(Exception, match="were removed, so it cannot be trained further"):
        check_run(longer)


def test_a_name_under_runs_is_a_run_everywhere(runs: Path) -> None:
    assert run_path("mine") == Path("runs/mine")
    assert run_path("runs/mine") == Path("runs/mine")
    assert run_path("owner/name") == Path("owner/name")
    assert near_runs("mien") == ["runs/mine"]
    assert near_runs("runs/mien") == ["runs/mine"]
    assert names_a_run("runs/mien")
    assert names_a_run("runz/mien")
    assert not names_a_run("runz/stable-diffusion-v1-5")  # an owner of models may be called so
    assert not names_a_run("owner/name")


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "mien"],
        ["sample", "runs/mien"],
        ["sample", "runz/mien"],
        ["info", "runs/mien"],
        ["export", "mien", "--format", "kohya", "--output", "x.safetensors"],
        ["evaluate", "mien"],
        ["report", "mien"],
        ["distill", "--teacher", "runs/mien"],
    ],
)
def test_a_mistyped_name_lists_the_near_ones_and_is_not_a_hub_id(
    command: Command, runs: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcmdistill.teachers import loading

    monkeypatch.setattr(loading, "_download", lambda *_: pytest.fail("it was taken for a hub id"))
    code, _, error = command(*words)
    assert code == 2
    assert "did you mean runs/mine?" in error


@pytest.mark.parametrize("words", [["info", "mine"], ["report", "mine"]])
def test_commands_take_a_name(command: Command, runs: Path, words: list[str]) -> None:
    assert command(*words)[0] == 0


def test_the_cache_is_listed_and_cleared(command: Command, runs: Path, tmp_path: Path) -> None:
    from lcmdistill.training.run_data import read_record

    record = read_record(runs / "mine")
    assert record
    root = tmp_path / "cache"
    for kind, name in (("latents", record[0].latents), ("teacher-outputs", "b" * 24)):
        folder = claim_folder(root / kind / name)
        (folder / "00000000-00000002.safetensors").write_bytes(bytes(2_000_000))
    (root / "latents" / "thesis").mkdir()
    code, text, _ = command("cache")
    assert code == 0
    rows = {row.split()[0]: row for row in text.splitlines()[1:-1]}
    assert set(rows) == {record[0].latents, "b" * 24}
    assert "2.0 MB" in rows[record[0].latents]
    assert "fast, mine" in rows[record[0].latents]
    assert "teacher outputs" in rows["b" * 24]
    assert "nothing to clear" in command("cache", "clear", "--older-than", 1)[1]
    assert "has no entry 'zz'" in command("cache", "clear", "zz")[2]
    assert "add --yes" in command("cache", "clear")[2]
    assert "removed 2.0 MB" in command("cache", "clear", "bbbb", "--yes")[1]
    assert "removed 2.0 MB" in command("cache", "clear", "-y")[1]
    assert (root / "latents" / "thesis").is_dir()
    assert command("cache")[1] == f"{root}: empty\n"
