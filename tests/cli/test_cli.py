"""The command line: whatever goes wrong ends in one sentence and an exit code; --help is instant; --dry-run is dry."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmdistill import cli
from lcmdistill.cli import _errors
from lcmdistill.config.toml import read_toml
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training import checkpoint, preflight
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.utils import errors
from lcmdistill.utils.runtime import SPIN_COUNT
from tests.support.runs import resolve
from tests.support.teachers import SMALL, Command

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def options(small_teacher: Path, image_folder: Path) -> list[Any]:
    """A small distillation that would work."""
    sets = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    return ["distill", "--teacher", small_teacher, "--data", image_folder, "--output", "out", *sets]


def sentence(error: str) -> str:
    """Return the error message: one line, and no traceback."""
    assert error.startswith("Error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error[len("Error: ") : -1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "no-such-teacher"], "there is no model 'no-such-teacher'"),
        (["--teacher", "no/such/teacher"], "there is no model 'no/such/teacher'"),
        (["--data", "no-such-data"], "--data no-such-data does not exist"),
        (["--data", "absent.tar"], "--data absent.tar: there is no shard absent.tar"),
        (["--data", "empty"], "--data empty holds neither images nor .tar shards"),
        (["--data", "corrupt"], "--data corrupt: none of 3 samples can be used (3 x corrupt image)"),
        (["--prompts", "absent.txt", "--data", "teacher"], "--prompts absent.txt cannot be read"),
        (["--config", "absent.toml"], "--config absent.toml cannot be read"),
        (["--resolution", "20"], "data.resolution is 20; it must be a multiple of 8"),
        (
            ["--set", "optim.lerning_rate=1"],
            "unknown setting 'optim.lerning_rate'; did you mean 'optim.learning_rate'?",
        ),
        (["--set", "optim.learning_rate"], "--set 'optim.learning_rate' is not of the form section.key=value"),
        (["--skip", "1000"], "objective.skip (k) is 1000; it must be from 1 to 999"),
        (["--skip", "0"], "objective.skip (k) is 0; it must be from 1 to 999"),
        (["--set", "objective.w_min=9"], "objective.w_min is 9.0, above objective.w_max"),
        (["--batch-size", "0"], "optim.batch_size is 0; it must be from 1 to 65536"),
        (["--gradient-accumulation-steps", "0"], "optim.gradient_accumulation_steps is 0; it must be from 1 to 65536"),
        (["--max-train-steps", "-5"], "optim.max_train_steps is -5; it must be at least 1"),
        (["--learning-rate", "nan"], "optim.learning_rate is nan; it must be a finite number"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99 is not available: "),
        (["--output", "thesis"], "--output thesis contains files that are not from lcmdistill"),
        (["--output", "file.txt"], "--output file.txt is a file; specify a folder"),
        (["--output", "file.txt/x"], "--output file.txt/x cannot be created: "),
        (["--set", "student.kind=lora"], "student.kind is not for --set: distill trains a full student, distill-lora"),
        (
            ["--config", "lora.toml"],
            "--config lora.toml is for distill-lora: its student.kind is 'lora'; run lcmdistill",
        ),
        (["--skip", "30"], "objective.skip (k) is 30, which does not divide T = 1000"),
    ],
)
def test_wrong_usage_ends_in_one_sentence(
    command: Command, options: list[Any], tmp_path: Path, more: list[str], message: str
) -> None:
    for name in ("empty", "corrupt", "thesis"):
        (tmp_path / name).mkdir()
    for i in range(3):
        (tmp_path / "corrupt" / f"{i}.png").write_bytes(b"rubbish")
        (tmp_path / "corrupt" / f"{i}.txt").write_text("a caption")
    (tmp_path / "thesis" / "chapter.txt").write_text("hello")
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "lora.toml").write_text('[student]\nkind = "lora"\n')
    if "--data" in more:
        at = options.index("--data")
        options = options[:at] + options[at + 2 :]
    began = time.monotonic()
    code, _, error = command(*options, *more)
    assert time.monotonic() - began < 20
    assert code == 2
    assert sentence(error).startswith(message)


def test_missing_cuda_is_reported(command: Command, options: list[Any]) -> None:
    code, _, error = command(*options, "--device", "cuda")
    assert code == 2
    assert sentence(error) == "--device cuda is not available: torch finds no CUDA GPU; use --device cpu or auto"


def test_an_output_that_is_not_writable_is_reported(
    command: Command, options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    code, _, error = command(*options)
    assert code == 2
    assert "no permission" in sentence(error)


def test_a_resumed_run_of_another_configuration_is_refused(command: Command, options: list[Any]) -> None:
    assert command(*options, "--max-train-steps", 1)[0] == 0
    code, _, error = command(*options, "--max-train-steps", 2, "--learning-rate", "3e-4")
    assert code == 2
    expected = "out contains a run with optim.learning_rate = 0.001 (this command: 0.0003); use the original settings to resume"
    assert sentence(error).startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--no-such-option"], "lcmdistill distill has no option --no-such-option"),
        # Typer's own words, or click's: with its version.
        (
            ["distill", "--batch-size", "x"],
            "'--batch-size': (it should be a whole number, got 'x'|'x' is not a (valid int|whole number))",
        ),
        (["distill", "--objective", "dmd"], "'--objective': 'dmd' is not one of 'lcm'"),
        (
            ["sample", "--steps", "0"],
            "'--steps': (it should be greater than or equal to 1, got '0'|0 is not in the range)",
        ),
        (["no-such-command"], "lcmdistill has no command 'no-such-command'; choose from distill, distill-lora, sample"),
        (["export"], "missing argument '(run|RUN)'"),
        (["export", "run", "--output", "x"], "missing option '--format'; choose from: pipeline, fused, kohya"),
        (["distill", "--seed"], "option --seed requires a value"),
    ],
)
def test_what_the_parser_refuses_it_says_in_one_sentence(command: Command, arguments: list[str], message: str) -> None:
    code, output, error = command(*arguments)
    assert (code, output) == (2, "")
    assert re.search(message, sentence(error))
    assert re.search(r"; see .*lcmdistill.* --help$", sentence(error))


def test_only_the_first_of_several_processes_reports(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the launcher to end them; if it does not, the error is one that they alone have met."""
    waited: list[float] = []
    monkeypatch.setattr(_errors.time, "sleep", waited.append)
    arguments = ["distill", "--data", "no-such-data"]
    monkeypatch.setenv("RANK", "0")
    first = sentence(command(*arguments)[2])
    assert (first.startswith("--data no-such-data does not exist"), waited) == (True, [])
    monkeypatch.setenv("RANK", "3")
    code, _, error = command(*arguments)
    assert (code, sentence(error)) == (2, f"process 3: {first}")
    assert waited[0] >= 1


OUT_OF_MEMORY = (
    "out of memory; lower --batch-size and raise --gradient-accumulation-steps by the same factor, "
    "or lower --resolution"
)

NO_SPACE = "no space left on device; free some space or choose another --output"


def allocate_too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def raising(error: BaseException) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), NO_SPACE),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), NO_SPACE),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (PermissionError(13, "Permission denied", "/somewhere"), "/somewhere cannot be written or read"),
        (ZeroDivisionError("a\nb"), "ZeroDivisionError: a (run again with --debug for the traceback)"),
        (ZeroDivisionError(), "ZeroDivisionError: no message (run again with --debug for the traceback)"),
    ],
)
def test_a_failure_ends_in_one_sentence_and_keeps_what_was_saved(
    command: Command, options: list[Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_checkpoint", raising(error))
        code, _, output = command(*options)
    assert code == 1
    assert sentence(output).startswith(message)


def test_the_cpu_s_own_words_for_out_of_memory_are_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert errors.explain(caught.value) == (OUT_OF_MEMORY, 1)


def test_a_full_disk_leaves_the_last_checkpoint(
    command: Command, options: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = checkpoint.torch.save

    def full(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if state["step"] > 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.torch, "save", full)
        assert command(*options)[0] == 1
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000002"]
    code, output, _ = command(*options)
    assert code == 0
    assert "resuming from step-00000002" in output


def test_debug_shows_the_traceback(options: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "check_early", raising(ZeroDivisionError("here")))
    monkeypatch.setattr(sys, "argv", ["lcmdistill", *map(str, options), "--debug"])
    with pytest.raises(ZeroDivisionError, match="here"):
        cli.main()


def test_ctrl_c_before_anything_ran_is_no_traceback(
    command: Command, options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_early", raising(KeyboardInterrupt()))
    code, _, error = command(*options)
    assert code == 130
    assert "Traceback" not in error


def process(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """What became of `lcmdistill ARGUMENTS`, and the seconds that it took."""
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "lcmdistill", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ended, time.monotonic() - began


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, SPIN_COUNT), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_the_spin_count_is_set_before_torch_is_imported(given: dict[str, str], expected: str | None) -> None:
    expression = "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    code = f"import os, sys; from lcmdistill import cli; cli.app = lambda **_: {expression}; cli.main()"
    own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in own} | given
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stdout == f"{expected} False\n"


@pytest.mark.parametrize("offline", [pytest.param("1", marks=pytest.mark.slow), "0"])
def test_an_unreachable_hub_is_reported_within_seconds(tmp_path: Path, offline: str) -> None:
    arguments = ["distill", "--teacher", "owner/no-such-teacher", "--output", str(tmp_path / "out")]
    nowhere = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    ended, seconds = process(*arguments, **nowhere)
    assert ended.returncode == 1
    output = sentence(ended.stderr)
    assert output.startswith(f"owner/no-such-teacher is not in the local cache ({tmp_path / 'hub'}")
    assert "--teacher tiny" in output
    assert ("HF_HUB_OFFLINE is set" in output) == (offline == "1")
    assert seconds < 40


def test_a_process_says_one_sentence_and_with_debug_its_traceback(tmp_path: Path) -> None:
    arguments = ["distill", "--data", "no-such-data", "--output", str(tmp_path / "out")]
    plain, _ = process(*arguments)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert sentence(plain.stderr).startswith("--data no-such-data does not exist")
    debugged, _ = process(*arguments, "--debug")
    assert debugged.returncode != 0
    assert "Traceback (most recent call last)" in debugged.stderr
    assert "UsageError: --data no-such-data does not exist" in debugged.stderr


def test_a_dry_run_tells_everything_and_writes_nothing(
    command: Command, options: list[Any], tmp_path: Path, image_folder: Path
) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes((image_folder / "00.webp").read_bytes() if i else b"rubbish")
        (tmp_path / "bad" / f"{i}.txt").write_text("a caption" if i < 2 else "")
    before = sorted(tmp_path.rglob("*"))
    code, output, error = command(*options, "--data", "bad", "--dry-run")
    assert (code, error) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert f"data {image_folder}: 12 kept, 0 dropped" in output
    assert "data bad: 1 kept, 2 dropped: 1 x corrupt image, 1 x no caption" in output
    assert "output: out (new)" in output
    assert re.search(r"epsilon-predicting U-Net of [\d,]+ parameters", output)
    assert re.search(r"memory, estimated: \d+\.\d+ GiB", output)
    assert re.search(r"time, estimated from a few passes on this device: [\d.]+ s", output)
    assert re.search(r"  training +[\d.]+ s  4 steps of ", output)
    assert "[teacher]" not in output
    assert "nothing was written" in output


def test_a_dry_run_misses_a_tracker_before_it_opens_anything(
    command: Command, options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, output, error = command(*options, "--report-to", "wandb", "--dry-run")
    assert (code, output) == (2, "")
    assert sentence(error) == "--report-to wandb needs: pip install 'lcmdistill[wandb]'"


def test_the_configuration_that_a_dry_run_prints_is_the_run_s(
    command: Command, options: list[Any], tmp_path: Path
) -> None:
    _, output, _ = command(*options, "--dry-run", "--full")
    toml = output[output.index("[teacher]") : output.index("dry run: ")]
    (tmp_path / "printed.toml").write_text(toml)
    printed = resolve(read_toml(tmp_path / "printed.toml"), {})
    assert printed == resolve_run_defaults(printed, 1, load_teacher(printed.teacher.model))
    assert command(*options)[0] == 0
    written = (tmp_path / "out" / "config.toml").read_text()
    assert "# Learning rate (AdamW).\nlearning_rate = " in written
    assert re.sub(r"(?m)^# .*\n", "", written).strip() == toml.strip()


def test_a_dry_run_of_a_started_run_reports_it(command: Command, options: list[Any], tmp_path: Path) -> None:
    assert command(*options, "--max-train-steps", 1)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, output, _ = command(*options, "--dry-run")
    assert code == 0
    assert "output: out (a run to resume)" in output
    assert "1 cached chunks are ready" in output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_dry_run_refuses_what_the_run_would(command: Command, options: list[Any]) -> None:
    code, _, error = command(*options, "--dry-run", "--resolution", 20)
    assert code == 2
    assert sentence(error).startswith("data.resolution is 20")
