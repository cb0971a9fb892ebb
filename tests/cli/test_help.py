"""`--help`: instant, and grouped in plain text."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import typer

from lcmdistill.cli import app
from lcmdistill.cli._options import OTHER_GROUPS
from tests.support.teachers import Command

ROOT = Path(__file__).parent.parent.parent


def test_the_help_of_training_lists_its_options_by_group(command: Command) -> None:
    """In plain text of 80 columns, the same in a pipe, with the options that most users need first."""
    code, text, _ = command("distill", "--help")
    assert code == 0
    assert re.findall(r"^(\w.*):$", text, flags=re.MULTILINE) == [
        "Most used",
        "Model",
        "Data",
        "Method",
        "Optimization",
        "Run",
        "Advanced",
        "Options",
    ]
    first = text[text.index("Most used:") : text.index("Model:")]
    assert re.findall(r"^  (--[a-z-]+)", first, flags=re.MULTILINE) == [
        "--teacher",
        "--data",
        "--output",
        "--max-train-steps",
        "--memory",
        "--dry-run",
    ]
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "\nLoRA:\n" in command("distill-lora", "--help")[1]


def test_a_bare_command_shows_the_help(command: Command) -> None:
    code, _, output = command()
    assert code == 2
    assert all(name in output for name in ("Usage:", "distill-lora", "export"))


def test_help_takes_half_a_second_and_no_torch() -> None:
    """Half a second of the processor's time, however busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lcmdistill", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0
    assert "distill" in ended.stdout
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.5
    for name in ("distill", "sample"):
        code = f"import sys; sys.argv = ['lcmdistill', '{name}', '--help']; from lcmdistill.cli import app; app()"
        watch = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
        ended = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "False")


def test_the_help_of_other_commands_is_grouped_as_well(command: Command) -> None:
    """Every parameter that a group names exists, and metavars are plain."""
    for name, groups in OTHER_GROUPS.items():
        text = command(name, "--help")[1]
        parameters = {each.name for each in typer.main.get_command(app).commands[name].params}  # pyright: ignore[reportAttributeAccessIssue]
        assert {each for names in groups.values() for each in names} <= parameters
        assert [line for line in text.splitlines() if re.fullmatch(r"\w.*:", line)] == [
            "Arguments:",
            *(f"{group}:" for group in groups),
            "Options:",
        ]
        assert not re.search(r"list\[|int range", text)


def test_the_list_of_commands_is_not_cut_off(command: Command) -> None:
    assert "..." not in command("--help")[1].partition("Commands:")[2]
