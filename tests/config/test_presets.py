"""Presets, what a teacher's own files decide, and the configurations that ship as examples."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.config.examples import FOLDER, config_file, example_names
from lcmdistill.config.presets import PRESETS, PresetName
from lcmdistill.config.resolve import with_values
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, read_toml
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.utils.errors import UsageError
from tests.support.models import build_sdxl
from tests.support.runs import preset_changes, resolve
from tests.support.teachers import SMALL, Command

ROOT = Path(__file__).parent.parent.parent

EXAMPLES = sorted(FOLDER.glob("*.toml"))


def of(kind: str, preset: str | None, file: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
    return flatten(
        resolve(file or {}, {"student.kind": kind, **{k.replace("__", "."): v for k, v in flags.items()}}, preset)
    )


# method.md's table of published settings: learning rate, omega, batch, steps, and what else it says.
PUBLISHED = [
    ("full", "paper", 8e-6, (2, 14), 72, 100_000, {"objective.ema_decay": 0.999943, "objective.distance": "l2"}),
    ("full", "diffusers", 1e-6, (5, 15), 12, 1000, {"objective.ema_decay": 0.95, "student.omega_init": "random"}),
    ("lora", "diffusers", 1e-4, (5, 15), 12, 1000, {"student.rank": 64, "student.alpha": 64, "student.target": "live"}),
    ("lora", "lcm-lora", 1e-4, (7.5, 7.5), 12, 1000, {"student.rank": 64, "student.target": "live"}),
]


@pytest.mark.parametrize(("kind", "preset", "rate", "omega", "batch", "steps", "more"), PUBLISHED)
def test_a_preset_is_what_was_published(
    kind: str, preset: str, rate: float, omega: tuple[float, float], batch: int, steps: int, more: dict[str, Any]
) -> None:
    settings = of(kind, preset)
    assert settings["optim.learning_rate"] == rate
    assert (settings["objective.w_min"], settings["objective.w_max"]) == omega
    assert settings["optim.batch_size"] * settings["optim.gradient_accumulation_steps"] == batch
    assert settings["optim.max_train_steps"] == steps
    assert settings["objective.skip"] == 20
    assert {key: settings[key] for key in more} == more


def test_the_names_are_those_of_the_presets() -> None:
    assert [str(name) for name in PresetName] == list(PRESETS)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_of_a_preset_is_a_setting(preset: str, kind: str) -> None:
    values = PRESETS[preset].values(kind)
    if values is None:
        with pytest.raises(UsageError, match=f"--preset {preset} is not for distill.*; choose from .*fast"):
            of(kind, preset)
        return
    settings = of(kind, preset, teacher__model="tiny")
    assert {key: settings[key] for key in values if values[key] is not None} == {
        key: value for key, value in values.items() if value is not None
    }


def test_a_preset_wins_over_the_teacher_and_gives_way_to_file_and_flags() -> None:
    key = "optim.learning_rate"
    assert of("full", None, teacher__model="tiny")[key] == 1e-4
    assert of("full", "paper", teacher__model="tiny")[key] == 8e-6
    assert of("full", "paper", {key: 3e-5})[key] == 3e-5
    assert of("full", "paper", {key: 3e-5}, optim__learning_rate=7e-5)[key] == 7e-5


def test_a_preset_can_leave_a_key_to_the_teacher() -> None:
    assert "objective.w_min" not in resolve({}, {}, "diffusers").chosen
    assert "objective.w_min" in resolve({}, {}, "paper").chosen


def test_a_preset_is_shown_as_a_difference(command: Command, small_teacher: Path, image_folder: Path) -> None:
    assert preset_changes({"student.kind": "lora"}, "lcm-lora") == []
    assert "optim.max_train_steps: 4000 -> 100000" in preset_changes({"optim.max_train_steps": 1}, "paper")
    assert "optim.learning_rate: 0.0001 -> 8e-06" in preset_changes({"teacher.model": "tiny"}, "paper")
    sets = [f"--set={key}={value}" for key, value in SMALL.items() if not key.startswith("objective.")]
    code, output, error = command(
        "distill", "--preset", "paper", "--teacher", small_teacher, "--data", image_folder, *sets, "--dry-run", "--full"
    )
    assert (code, error) == (0, "")
    assert "preset paper (Luo et al. 2023" in output
    assert "  objective.w_max: 15.0 -> 14.0\n" in output
    assert "w_max = 14.0" in output
    assert "learning_rate = 0.001" in output  # the flag's
    code, output, error = command("distill", "--preset", "lcm-lora")
    assert (code, output) == (2, "")
    assert error.startswith("Error: --preset lcm-lora is not for distill; choose from paper, diffusers, fast")


def test_the_default_resolution_is_the_teacher_s(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    assert teacher.usual["data.resolution"] == 16  # 8 latent pixels, a factor of 2
    bare, explicit = (
        resolve({}, {"teacher.model": str(small_teacher), **more}) for more in ({}, {"data.resolution": 512})
    )
    assert resolve_run_defaults(bare, 1, teacher).data.resolution == 16
    assert resolve_run_defaults(explicit, 1, teacher).data.resolution == 512
    assert resolve_run_defaults(resolve({"data.resolution": 512}, {}), 1, teacher).data.resolution == 512
    assert resolve_run_defaults(resolve({}, {"teacher.model": "tiny"}), 1, teacher).data.resolution == 64
    # nor does a key that the objective does not have come in
    assert (
        resolve_run_defaults(
            bare, 1, replace(teacher, family=replace(teacher.family, published={"objective.unheard_of": 1}))
        ).objective
        == bare.objective
    )


def test_a_run_at_the_teacher_s_own_resolution_resumes(
    command: Command, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    sets = [f"--set={key}={value}" for key, value in SMALL.items() if key != "data.resolution"]
    options = ["distill", "--teacher", small_teacher, "--data", image_folder, "--output", "out", *sets]
    code, _, error = command(*options, "--max-train-steps", 2)
    assert (code, error) == (0, "")
    assert read_toml(tmp_path / "out" / "config.toml")["data.resolution"] == 16
    code, output, error = command(*options, "--dry-run")
    assert (code, error) == (0, "")
    assert "a run to resume" in output
    code, output, error = command(*options)
    assert (code, error) == (0, "")
    assert "resuming from step-00000002" in output
    code, _, error = command(*options, "--resolution", 32, "--max-train-steps", 5)
    assert code == 2
    assert "contains a run with data.resolution = 16 (this command: 32)" in error


def test_a_resolution_that_was_chosen_is_not_forgotten(
    command: Command, small_teacher: Path, image_folder: Path
) -> None:
    sets = [f"--set={key}={value}" for key, value in SMALL.items() if key != "data.resolution"]
    options = ["distill", "--teacher", small_teacher, "--data", image_folder, "--output", "out", *sets]
    assert command(*options, "--resolution", 32, "--max-train-steps", 2)[0] == 0
    code, _, error = command(*options)
    assert code == 2
    assert "contains a run with data.resolution = 32 (this command: 16)" in error


def test_values_are_put_in_by_their_names() -> None:
    config = with_values(resolve({}, {}), {"data.resolution": 64, "objective.w_min": 1.0})
    assert isinstance(config, RunConfig)
    assert (config.data.resolution, config.objective.w_min, config.optim) == (64, 1.0, resolve({}, {}).optim)


def test_sdxl_starts_at_its_own_omega(tmp_path: Path) -> None:
    """The public SDXL script draws omega from 3, whatever the checkpoint is called; an adapter's is fixed."""
    teacher = load_teacher(str(build_sdxl(tmp_path / "model")))
    assert teacher.usual == {"objective.w_min": 3.0, "data.resolution": 64}  # 16 latent pixels, a factor of 4
    for preset in (None, "diffusers"):
        config = resolve_run_defaults(resolve({}, {"teacher.model": "owner/name"}, preset), 1, teacher)
        assert (config.objective.w_min, config.objective.w_max) == (3.0, 15.0)
    assert resolve_run_defaults(resolve({}, {"student.kind": "lora"}), 1, teacher).objective.w_min == 7.5
    assert resolve_run_defaults(resolve({}, {"student.kind": "lora"}, "diffusers"), 1, teacher).objective.w_min == 3.0
    assert resolve_run_defaults(resolve({}, {}, "paper"), 1, teacher).objective.w_min == 2.0


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_runs_as_its_head_says(
    path: Path, command: Command, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    head = dict(re.findall(r"^# (command|hardware|duration|result): +(\S.*)$", path.read_text(), flags=re.MULTILINE))
    assert set(head) == {"command", "hardware", "duration", "result"}
    words = shlex.split(head["command"].split("-m lcmdistill ")[-1].removeprefix("lcmdistill "))
    where = words.index("--config") + 1
    assert config_file(words[where]) == path
    shutil.copytree(image_folder, tmp_path / "path" / "to" / "images")
    kind, file = "lora" if words[0] == "distill-lora" else "full", read_toml(path)
    assert file["student.kind"] == kind
    preset = words[words.index("--preset") + 1] if "--preset" in words else None
    settings = flatten(resolve(file, {}, preset))
    assert {key: settings[key] for key in file} == {k: tuple(v) if isinstance(v, list) else v for k, v in file.items()}
    if "--teacher" in words:
        del words[(i := words.index("--teacher")) : i + 2]
    less = ["--teacher", small_teacher, "--resolution", 16, "--device", "cpu", "--set", "teacher.variant=none"]
    less += ["--rank", 4] if kind == "lora" else []
    code, output, error = command(*words, *less, "--dry-run", "--full")
    assert (code, error) == (0, "")
    assert "nothing was written" in output
    assert json.dumps(file["optim.batch_size"]) in output


def test_there_is_an_example_for_every_common_case() -> None:
    examples = {path.stem: read_toml(path) for path in EXAMPLES}
    teachers = {values.get("teacher.model") for values in examples.values()}
    assert {"sd15", "sd21", "sdxl", None} <= teachers
    assert {values["student.kind"] for values in examples.values()} == {"full", "lora"}


def test_the_shipped_configurations_are_listed_and_found_by_name(command: Command, tmp_path: Path) -> None:
    code, output, _ = command("distill", "--config", "list")
    assert code == 0
    for path in EXAMPLES:
        assert re.search(rf"^{path.stem}\n    \w.*\n    \S*(lcmdistill|torchrun) ", output, flags=re.MULTILINE)
        assert config_file(path.stem) == path
    assert example_names() == [path.stem for path in EXAMPLES]
    code, _, error = command("distill", "--config", "sd15-ful")
    assert (code, error.count("\n")) == (2, 1)
    assert "did you mean sd15-full?" in error
    assert "one of my-checkpoint, sd15-8gpu, " in command("distill", "--config", "nope")[2]
    (tmp_path / "sd15-full").write_text("")
    assert config_file("sd15-full") == Path("sd15-full")  # a file of one's own comes first


def test_the_example_of_a_case_is_what_the_defaults_are() -> None:
    for name, kind in (("sd15-full", "full"), ("sd15-lora-12gb", "lora")):
        file = read_toml(config_file(name))
        assert resolve(file, {}) == resolve({}, {"student.kind": kind, "teacher.model": "sd15"})
