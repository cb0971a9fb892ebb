"""Sampling: the pictures and what is written with them, from the newest run or any model, whatever the batch."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcmdistill.sampling.generate import GeneratedImage, find_model, generate, grid, load_student, write_images
from lcmdistill.utils.errors import UsageError
from tests.support.teachers import Command


@pytest.fixture(scope="module")
def student(small_run: Path) -> Any:
    return load_student(str(small_run / "pipeline"), torch.device("cpu"))


def pixels(drawings: list[GeneratedImage]) -> np.ndarray:
    return np.stack([np.asarray(drawing.image, dtype=float) for drawing in drawings])


@pytest.mark.parametrize("steps", [1, 4])
def test_an_image_does_not_depend_on_its_batch(student: Any, steps: int) -> None:
    prompts, seeds = ["red heart", "grinning face", "dog face"], [0, 1, 2]
    options: dict[str, Any] = {"steps": steps, "guidance_scale": 4.0, "resolution": 16}
    alone = pixels(generate(student, prompts, seeds, batch_size=1, **options))
    together = pixels(generate(student, prompts, seeds, batch_size=3, **options))
    assert np.abs(alone - together).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 1
    turned = generate(student, prompts[::-1], seeds[::-1], batch_size=2, **options)
    assert [(d.prompt, d.seed) for d in turned] == [("dog face", 2), ("grinning face", 1), ("red heart", 0)]
    assert np.abs(pixels(turned)[::-1] - alone).max() <= 1


def test_progress_is_told(student: Any) -> None:
    done: list[int] = []
    generate(
        student, ["a"] * 5, range(5), steps=1, guidance_scale=4.0, resolution=16, batch_size=2, on_progress=done.append
    )
    assert done == [2, 4, 5]


def test_what_was_drawn_is_in_the_metadata(tmp_path: Path) -> None:
    prompt = "a “caf\u00e9”, 東京"
    drawing = GeneratedImage(Image.new("RGB", (16, 16), "red"), prompt, 7)
    how: dict[str, Any] = {"model": "runs/x/pipeline", "steps": 4, "guidance_scale": 4.5, "sampler": "LCM"}
    write_images([drawing], tmp_path, **how)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000-a-caf.png", "grid.png"]
    text = getattr(Image.open(tmp_path / names[0]), "text")  # noqa: B009
    own = {key: str(value) for key, value in how.items()} | {"prompt": prompt, "seed": "7"}
    settings = "Steps: 4, Sampler: LCM, CFG scale: 4.5, Seed: 7, Size: 16x16, Model: runs/x/pipeline"
    assert text == {**own, "parameters": f"{prompt}\n{settings}"}
    write_images([drawing], tmp_path, **how, loras=[("lcm.safetensors", 1.0), ("style", 0.5)])
    text = getattr(Image.open(tmp_path / names[0]), "text")  # noqa: B009
    assert text["loras"] == "lcm.safetensors: 1, style: 0.5"
    assert text["parameters"].endswith(', Loras: "lcm.safetensors: 1, style: 0.5"')


def test_the_scheduler_that_really_drew_is_told(command: Command, tmp_path: Path, small_teacher: Path) -> None:
    assert command("sample", small_teacher, "--prompt", "dog face", "--steps", 2, "--output", "out")[0] == 0
    text = getattr(Image.open(tmp_path / "out" / "000-dog-face.png"), "text")  # noqa: B009
    assert text["sampler"] == "DDIM"
    assert "loras" not in text


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3)])
def test_all_images_are_in_the_grid(tmp_path: Path, count: int, columns: int) -> None:
    drawings = [GeneratedImage(Image.new("RGB", (128, 128), (10 * i, 0, 0)), "a", i) for i in range(count)]
    picture = Image.open(write_images(drawings, tmp_path, model="m", steps=1, guidance_scale=1.0, sampler="LCM"))
    colours = {colour for _, colour in picture.getcolors() or []}
    assert colours == {*((10 * i, 0, 0) for i in range(count)), (255, 255, 255)}
    assert columns * 128 < picture.width < columns * 140
    assert len(list(tmp_path.iterdir())) == count + 1


def test_a_grid_has_headings_and_labels_and_small_images_are_enlarged() -> None:
    cell = Image.new("RGB", (16, 16), "red")
    plain = grid([[cell, cell]])
    labelled = grid([[cell, cell]], columns=["1 step", "2 steps\nmore"], labels=["a prompt"])
    assert plain.size[0] == labelled.size[0] >= 2 * 96
    assert labelled.size[1] > plain.size[1]


def test_a_run_is_found_with_what_it_was_trained_for(small_run: Path, small_teacher: Path) -> None:
    found = find_model(str(small_run))
    assert found.path == str(small_run / "pipeline")
    assert (found.resolution, found.teacher) == (16, str(small_teacher))
    assert found.guidance_scale == 4.0  # the middle of omega 1 to 5, and one
    folder = find_model(str(small_run / "pipeline"))
    assert (folder.path, folder.guidance_scale) == (str(small_run / "pipeline"), None)
    assert find_model("owner/name").path == "owner/name"


def test_the_newest_finished_run_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_run: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"there is no finished run under runs/"):
        find_model(None)
    for i, name in enumerate(["b", "a", "c"]):
        shutil.copytree(small_run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "pipeline" / "model_index.json", (1000 + i, 1000 + i))
    assert find_model(None).path == "runs/c/pipeline"
    shutil.rmtree(tmp_path / "runs" / "c" / "pipeline")  # not finished
    assert find_model(None).path == "runs/a/pipeline"
    with pytest.raises(UsageError, match=r"the run runs/c has no pipeline/ yet; run its distill command again"):
        find_model("runs/c")


def test_another_program_s_config_is_no_run(tmp_path: Path, small_run: Path) -> None:
    shutil.copytree(small_run / "pipeline", tmp_path / "model")
    (tmp_path / "model" / "config.toml").write_text("[tool]\nx = 1\n")
    assert find_model(str(tmp_path / "model")).path == str(tmp_path / "model")


def test_the_bare_command_draws_with_the_newest_run(command: Command, tmp_path: Path, small_run: Path) -> None:
    shutil.copytree(small_run, tmp_path / "runs" / "small-lcm")
    code, told, _ = command("sample", "--steps", 2)
    assert code == 0
    assert re.search(r"\d+ images at 2 steps, guidance scale 4: samples, all in samples/grid\.png", told)
    assert len(list((tmp_path / "samples").glob("[0-9]*.png"))) >= 4


def test_prompts_seeds_and_numbers_of_images(command: Command, tmp_path: Path, small_run: Path) -> None:
    (tmp_path / "prompts.txt").write_text("dog face\n\ncat face\n")
    options = ["--prompt", "red heart", "--prompts", "prompts.txt", "--num-images", 2, "--seed", 5, "--output", "out"]
    code, _, _ = command("sample", small_run, *options, "--steps", 1, "--guidance-scale", 3, "--resolution", 24)
    assert code == 0
    paths = sorted((tmp_path / "out").glob("[0-9]*.png"))
    assert [path.name for path in paths] == [
        *("000-red-heart.png", "001-red-heart.png", "002-dog-face.png"),
        *("003-dog-face.png", "004-cat-face.png", "005-cat-face.png"),
    ]
    texts = [getattr(Image.open(path), "text") for path in paths]  # noqa: B009
    assert [text["seed"] for text in texts] == ["5", "6", "7", "8", "9", "10"]
    assert {(text["steps"], text["guidance_scale"]) for text in texts} == {("1", "3")}
    assert {Image.open(path).size for path in paths} == {(24, 24)}


def test_the_same_seed_gives_the_same_picture(command: Command, tmp_path: Path, small_run: Path) -> None:
    for i, seed in enumerate([3, 3, 4]):
        command("sample", small_run, "--prompt", "dog face", "--seed", seed, "--steps", 2, "--output", f"out{i}")
    first, again, other = (Image.open(tmp_path / f"out{i}" / "000-dog-face.png").tobytes() for i in range(3))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no finished run under runs/"),
        (["no-such-model"], "'no-such-model'"),
        (["{run}", "--steps", "51"], "--steps is 51; this model's scheduler has 50"),
        (["{run}", "--resolution", "20"], "--resolution is 20; it must be a multiple of 8"),
        (["{run}", "--prompts", "absent.txt"], "--prompts absent.txt cannot be read"),
        (["{run}", "--output", "file.txt"], "--output file.txt is a file; name a folder"),
        (["{run}", "--output", "file.txt/x"], "--output file.txt/x cannot be made (Not a directory)"),
        (["{run}", "--guidance-scale", "nan"], "--guidance-scale is nan; it must be a finite number"),
        (["{run}", "--guidance-scale", "inf"], "--guidance-scale is inf; it must be a finite number"),
        (["{run}", "--lora", "x", "--lora-scale", "nan"], "--lora-scale is nan; each must be a finite number"),
        (["{run}", "--device", "tpu-or-so"], "--device 'tpu-or-so' is no device"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(
    command: Command, tmp_path: Path, small_run: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file.txt").write_text("hello")
    code, _, error = command("sample", *(a.format(run=small_run) for a in arguments), "--prompt", "dog face")
    assert code == 2
    assert error.startswith("Error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--num-images", "0"], ["--seed", "-1"], ["--seed", str(2**64)], ["--batch-size", "0"]],
)
def test_impossible_numbers_are_refused(command: Command, arguments: list[str]) -> None:
    code, _, error = command("sample", *arguments)
    assert code == 2
    assert arguments[0] in error
    assert "Traceback" not in error
