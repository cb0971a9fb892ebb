"""The README's commands do what it says: each `lcmdistill` line is run, small; each `make` target exists."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lcmdistill.cli import app
from lcmdistill.teachers import naming as teachers

ROOT = Path(__file__).parent.parent

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)

LINES = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]

COMMANDS = [line for line in LINES if line.startswith("lcmdistill ")]

SMALL = (
    "--resolution 16 --max-train-steps 1 --batch-size 1 --gradient-accumulation-steps 1 --device cpu "
    "--set data.max_samples=2"
)

SMALLER = {
    "distill": SMALL,
    "distill-lora": f"{SMALL} --rank 4 --alpha 4",
    "evaluate": "--num-images 2 --steps 1 --device cpu",
    "export": "",
    "sample": "--device cpu --resolution 16",
}


@pytest.fixture
def user_folder(tmp_path: Path, small_teacher: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the README's placeholders exist, with sd15 standing for the small teacher."""
    shutil.copytree(small_teacher, tmp_path / "path/to/my-model")
    shutil.copytree(image_folder, tmp_path / "path/to/images")
    monkeypatch.setitem(teachers.ALIASES, "sd15", str(small_teacher))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_the_commands_that_users_come_for():
    assert len(COMMANDS) >= 4
    assert {command.split()[1] for command in COMMANDS} == {"distill", "distill-lora", "evaluate", "export", "sample"}


def test_every_command_and_the_python_example_run(user_folder: Path):
    for command in COMMANDS:
        words = shlex.split(command)[1:] + SMALLER[command.split()[1]].split()
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert (user_folder / "runs/sd15-lcm/pipeline/model_index.json").is_file()
    assert (user_folder / "runs/mine/pipeline/model_index.json").is_file()
    assert (user_folder / "samples/grid.png").is_file()
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(code, "README.md", "exec"), {})  # with what the commands have left
    assert (user_folder / "lighthouse.png").is_file()


def test_every_make_target_exists():
    targets = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_files_it_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((?!http|#)([^)]+)\)", text))
