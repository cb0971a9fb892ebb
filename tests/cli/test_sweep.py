"""`lcmdistill sweep`: how options span a grid, what the runs are called, and what is refused before anything is trained."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import lcmdistill
from lcmdistill.cli.sweep import time_left_text
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.teachers import Command

module: Any = import_module("lcmdistill.cli.sweep")
"the module, of which the package has a function of the same name"


def grid(*words: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    fixed, axes = module.split_grid(words, module._parameters("distill"))
    return fixed, list(module.grid_cells(axes))


def test_options_with_several_values_span_the_grid():
    fixed, cells = grid("--teacher", "tiny", "--objective=lcm,tcd", "--set", "objective.skip=5, 20", "--seed", "3")
    assert fixed == ["--teacher=tiny", "--seed=3"]
    assert cells == [
        ("lcm_skip-5", ["--objective=lcm", "--set=objective.skip=5"]),
        ("lcm_skip-20", ["--objective=lcm", "--set=objective.skip=20"]),
        ("tcd_skip-5", ["--objective=tcd", "--set=objective.skip=5"]),
        ("tcd_skip-20", ["--objective=tcd", "--set=objective.skip=20"]),
    ]


def test_commas_of_lists_and_paths_are_not_alternatives():
    assert module.split_values('1, [2, 3], "a, b", {4,5}.tar') == ["1", "[2, 3]", '"a, b"', "{4,5}.tar"]
    words = ["--data", "a,b.tar", "--set", 'run.validation_prompts=["a, b", "c"]', "--debug", "--set=data.flip=true"]
    fixed, cells = grid(*words)
    assert fixed == ["--data=a,b.tar", '--set=run.validation_prompts=["a, b", "c"]', "--debug", "--set=data.flip=true"]
    assert cells == [("", [])]


def test_runs_are_named_after_their_settings():
    names = [name for name, _ in grid("--learning-rate", "1e-5,1e-4", "--set", "student.target=ema,live")[1]]
    assert names[:2] == ["learning_rate-1e-5_target-ema", "learning_rate-1e-5_target-live"]
    assert [name for name, _ in grid("--teacher", "a/b,/models/c d.safetensors")[1]] == [
        "model-a-b",
        "model-models-c-d.safetensors",
    ]
    with pytest.raises(UsageError, match=r"objective.skip is given several values twice"):
        grid("--skip", "1,2", "--set", "objective.skip=3,4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "lcm"], "has no option with several values"),
        (["--objective", "lcm,nope"], "nope: invalid value for '--objective'"),
        (["--objective", "lcm,ct"], "ct_skip-5: objective.skip is not a setting of ct"),
        (["--set", "optim.learning_rat=1,2"], "learning_rat-1: unknown setting 'optim.learning_rat'"),
        (["--skip", "20,7"], "skip-7: objective.skip (k) is 7, which does not divide T = 1000"),
        (["--objective", "lcm,tcd", "--rank-by", "ssim@x"], "--rank-by is 'ssim@x'"),
        (["--objective", "lcm,tcd", "--eval-guidance-scale", "0"], "--eval-guidance-scale is '0'; each number must be"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_trained(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
):
    monkeypatch.setattr(lcmdistill, "run", lambda config: pytest.fail("trained"))
    skip = ["--set", "objective.skip=5"] if "ct" in words[1] else []
    skip = ["--set", "objective.skip=5,20"] if "ct" in words[1].split(",") else skip
    code, _, error = command("sweep", "distill", "--teacher", "tiny", *words, *skip)
    assert (code, message in error) == (2, True), error


def test_a_dry_run_lists_the_runs(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(lcmdistill, "run", lambda config: pytest.fail("trained"))
    code, out, _ = command("sweep", "distill", "--teacher", "tiny", "--objective", "lcm,tcd", "--dry-run")
    assert code == 0
    assert "2 runs in runs/sweep-objective: lcm, tcd" in out
    first = "distill --teacher=tiny --objective=lcm --output=runs/sweep-objective/lcm --dry-run"
    assert f"time, disk and memory of the first run: lcmdistill {first}\n" in out


def test_a_run_that_fails_does_not_stop_the_others(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    trained: list[Any] = []
    compared: list[Any] = []

    def run(config: Any) -> None:
        trained.append(config.run.output)
        if config.objective.skip == 5:
            raise RunError("the loss is NaN or infinite")

    monkeypatch.setattr(lcmdistill, "run", run)
    monkeypatch.setattr(module, "evaluate_and_report", lambda runs, *others: compared.append((runs, others[1])))
    code, out, error = command("sweep", "distill", "--teacher", "tiny", "--skip", "1,5,20", "--output", "s")
    assert code == 1
    assert trained == ["s/skip-1", "s/skip-5", "s/skip-20"]
    assert compared == [([Path("s/skip-1"), Path("s/skip-20")], Path("s/comparison.html"))]
    assert "skip-5 failed: the loss is NaN" in out
    assert "1 of 3 runs failed: skip-5; the page has the others: s/comparison.html" in error


def test_the_time_left_of_a_sweep_follows_from_its_runs() -> None:
    assert time_left_text([], 4) == ""
    assert time_left_text([0.2], 3) == ""  # it had been finished before
    assert time_left_text([0.2, 60.0, 120.0], 2) == "  left 3 min 00 s and the evaluation"
