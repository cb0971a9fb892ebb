"""Every format of every family: written by the command, reloaded as its consumer does, and refused where it cannot be."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lcmdistill.export import EXPORTERS, diffusers_pipeline, lora_formats
from lcmdistill.export.trained_student import load_trained_student
from lcmdistill.export.verify import network_inputs, network_output
from lcmdistill.hub.model_card import export_card
from tests.support.finished_runs import finished_run
from tests.support.models import BUILDERS, FAMILY_BUILDERS
from tests.support.pixel_models import build_pixel
from tests.support.teachers import Command

FORMATS = {kind: [key for key, each in EXPORTERS.items() if kind in each.student_kinds] for kind in ("full", "lora")}

CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}", marks=[pytest.mark.slow] if name == "onnx" else [])
    for kind, names in FORMATS.items()
    for name in names
]

each_family = pytest.mark.parametrize("family", list(BUILDERS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(family, kind) -> the folder of a finished run."""
    folder, found = tmp_path_factory.mktemp("formats"), {}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        for family, build in BUILDERS.items():
            teacher = build(folder / family / "teacher")
            for kind in FORMATS:
                found[family, kind] = finished_run(teacher, kind, folder / family / kind)
    return found


PLACES = {
    "kohya": (("ComfyUI", "loras"), ("A1111", "Lora")),
    "single-file": (("ComfyUI", "checkpoints"), ("A1111", "Stable-diffusion")),
}
"format -> where its file goes in each program"


@each_family
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_export_gives_the_trained_output(
    family: str, kind: str, name: str, runs: dict[tuple[str, str], Path], command: Command, tmp_path: Path
) -> None:
    output = tmp_path / ("out.safetensors" if EXPORTERS[name].writes == "file" else "out")
    words = ["export", runs[family, kind], "--format", name, "--output", output, "--dtype", "fp32"]
    code, printed, error = command(*words)
    assert (code, error) == (0, "")
    assert "reloaded, largest difference" in printed
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == [output.name]
    first, *uses = [line for line in printed.splitlines() if line.startswith((str(output), "  "))]
    assert first.startswith(f"{output}: ")
    assert len(uses) == len(PLACES.get(name, ())) + 1
    places = PLACES.get(name, ()) if family == "sd1" else ()  # the others have betas that programs do not know
    for line, (program, place) in zip(uses, places, strict=False):
        assert line.startswith(f"  {program}: Copy out.safetensors to models/{place}. ")
        assert " 4 steps, CFG 1" in line
    scale = 4 if kind == "full" and name != "single-file" else 1
    assert uses[-1] == f"  {EXPORTERS[name].library}: scheduler LCMScheduler, 4 steps, guidance scale {scale}."


@pytest.mark.parametrize("family", ["inpainting", "pixart", "pixel"])
def test_a_pipeline_without_a_single_file_layout(family: str, command: Command, tmp_path: Path) -> None:
    build = build_pixel if family == "pixel" else FAMILY_BUILDERS[family]
    run = finished_run(build(tmp_path / "models" / "teacher"), "full", tmp_path / "run")
    words = ["export", run, "--format", "pipeline", "--output", tmp_path / "out", "--dtype", "fp32"]
    code, printed, error = command(*words)
    assert (code, error) == (0, "")
    assert "reloaded, largest difference" in printed
    if family != "inpainting":
        for name, output in (("single-file", "x.safetensors"), ("onnx", "x"), ("kohya", "x.safetensors")):
            code, _, error = command("export", run, "--format", name, "--output", tmp_path / output)
            assert (code, error.count("\n")) == (2, 1)
            assert not (tmp_path / output).exists()


@each_family
@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_single_file_states_what_it_is(
    family: str, kind: str, runs: dict[tuple[str, str], Path], tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "my model.safetensors"
    words = ["export", runs[family, kind], "--format", "single-file", "--output", path, "--no-verify"]
    assert command(*words)[0] == 0
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "my model"
    assert ("guidance 4 (omega 3) is baked in" in header["modelspec.usage_hint"]) == (kind == "full")


def test_a_guidance_scale_outside_the_trained_range_is_reported(
    runs: dict[tuple[str, str], Path], tmp_path: Path, command: Command
) -> None:
    words = ["export", runs["sd1", "full"], "--format", "single-file", "--no-verify"]
    for scale in (8, 90):
        code, output, _ = command(*words, "--guidance-scale", scale, "--output", tmp_path / f"{scale}.safetensors")
        assert code == 0
        assert (f"and never saw {scale}" in output) == (scale == 90)


@each_family
@pytest.mark.parametrize("kind", list(FORMATS))
def test_cards_name_the_class_that_opens_it(family: str, kind: str, runs: dict[tuple[str, str], Path]) -> None:
    own = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    card = export_card(runs[family, kind], "single-file", "me/mine", "a.safetensors").text
    assert f"{own}.from_single_file" in card
    lcm = kind == "full" and family != "sdxl"
    card = export_card(runs[family, kind], "onnx", "me/mine").text
    assert f"ORT{'LatentConsistencyModelPipeline' if lcm else own}.from_pretrained" in card


@each_family
def test_what_the_network_is_given_matters(family: str, runs: dict[tuple[str, str], Path]) -> None:
    """Every input that exports are compared on changes the output: one that did not would not be checked."""
    student = load_trained_student(runs[family, "full"])
    unet = student.pipeline().unet
    inputs = network_inputs(student.family, unet, 4.0)
    expected = network_output(student.family, unet, inputs)
    assert {"sample", "timestep", "encoder_hidden_states", "timestep_cond"} <= set(inputs)
    assert ("time_ids" in inputs) == (family == "sdxl")
    for name, value in inputs.items():
        changed = network_output(student.family, unet, {**inputs, name: value.flip(0) * 0.5})
        assert (changed - expected).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("full", ["--format", "kohya", "--output", "x.safetensors"], "--format kohya is for LoRA runs"),
        (
            "lora",
            ["--format", "pipeline", "--output", "x"],
            r"--format pipeline is for full students and \S+ is a LoRA run; use --format fused, kohya",
        ),
        ("lora", ["--format", "kohya", "--output", "x"], "must end in .safetensors"),
        ("lora", ["--format", "kohya", "--output", "/proc/x.safetensors"], "is not writable: .* in /proc"),
        ("lora", ["--format", "peft", "--output", "taken"], "taken exists; specify a new one"),
        (
            "lora",
            ["--format", "single-file", "--output", "x.safetensors", "--guidance-scale", "7"],
            "has no effect here",
        ),
        (
            "full",
            ["--format", "pipeline", "--output", "x", "--guidance-scale", "7"],
            "--guidance-scale 7 has no effect here: only --format single-file",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(
    kind: str, words: list[str], message: str, runs: dict[tuple[str, str], Path], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    code, output, error = command("export", runs["sd1", kind], *words)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert re.search(message, error)
    assert {path.name for path in tmp_path.iterdir()} <= {"taken", "cache"}


def stopped_by(number: int) -> Callable[..., None]:
    """Return a stand-in for the comparison of an export, at which everything is written: a signal ends the process there."""

    def stop(*args: object, **options: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    return stop


@pytest.mark.parametrize("name", ["fused", "kohya"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_export_leaves_nothing_that_looks_complete(
    name: str,
    number: signal.Signals,
    runs: dict[tuple[str, str], Path],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (diffusers_pipeline, lora_formats):
        monkeypatch.setattr(module, "check_close", stopped_by(number))
    output = tmp_path / ("out.safetensors" if name == "kohya" else "out")
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, _, error = command("export", runs["sd1", "lora"], "--format", name, "--output", output)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert code == 128 + number
    assert error.count("\n") == 1
    assert "saved files are intact" in error
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "kohya"])
def test_a_killed_export_leaves_nothing_that_looks_complete(
    name: str, runs: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    output = tmp_path / ("out.safetensors" if name == "kohya" else "out")
    code = f"""
import os, sys
from lcmdistill import cli
from lcmdistill.export import diffusers_pipeline, lora_formats
diffusers_pipeline.check_close = lora_formats.check_close = lambda *a, **k: os.kill(os.getpid(), 9)
sys.argv = ["lcmdistill", "export", {str(runs["sd1", "lora"])!r}, "--format", {name!r}, "--output", {str(output)!r}]
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left <= {"cache"}
