"""`lcmdistill sample`: where images go, what they are called, image to image, other schedulers, and Ctrl-C."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcmdistill.export.single_file import write_single_file
from lcmdistill.sampling import generate as sampling
from lcmdistill.teachers.loading import load_pipeline
from tests.support.models import FAMILY_BUILDERS
from tests.support.teachers import Command


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A finished run at runs/mine of the current folder."""
    return Path(shutil.copytree(small_run, tmp_path / "runs" / "mine"))


SMALL = ["--steps", 2, "--prompt", "red heart", "--device", "cpu"]


def test_images_go_into_the_run_and_none_is_overwritten(command: Command, run: Path) -> None:
    for n in range(2):
        code, output, error = command("sample", "mine", *SMALL, "--guidance-scale", 3, "--seed", 5)
        assert (code, error) == (0, "")
        assert (
            f"1 image at 2 steps, guidance scale 3: runs/mine/images/00{n}-red-heart_2-steps_cfg-3_seed-5.png" in output
        )
    names = [f"00{n}-red-heart_2-steps_cfg-3_seed-5.png" for n in range(2)]
    assert Image.open(run / "images" / names[0]).info["model"] == "mine"  # no path, which would name private folders
    assert sorted(path.name for path in (run / "images").iterdir()) == names
    code, output, _ = command("sample", run, *SMALL, "--num-images", 2, "--output", "out", "--steps", 1)
    assert "2 images at 1 step, " in output
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "000-red-heart_1-step_cfg-4_seed-0.png",
        "001-red-heart_1-step_cfg-4_seed-1.png",
        "grid_1-step_cfg-4_seed-0.png",
    ]


def test_a_model_that_is_not_a_run_has_its_images_in_the_current_folder(command: Command, run: Path) -> None:
    assert command("sample", run / "pipeline", *SMALL, "--resolution", 16)[0] == 0
    assert [path.name for path in Path("images").iterdir()] == ["000-red-heart_2-steps_cfg-8.5_seed-0.png"]


def test_a_file_without_a_vae_is_sampled_with_another(command: Command, run: Path, small_teacher: Path) -> None:
    pipeline = load_pipeline(str(small_teacher))
    write_single_file(pipeline, Path("whole.safetensors"), dtype=torch.float32)
    rest = {k: v for k, v in load_file("whole.safetensors").items() if not k.startswith("first_stage_model.")}
    save_file(rest, "part.safetensors")
    options = [*SMALL, "--resolution", 16, "--guidance-scale", 1]
    code, _, error = command("sample", "part.safetensors", *options)
    assert (code, "pass --vae, or --base MODEL" in error) == (2, True)
    assert command("sample", run, *SMALL, "--vae", small_teacher)[0] == 0
    assert command("sample", "part.safetensors", *options, "--base", small_teacher)[0] == 0
    code, _, error = command("sample", run, *SMALL, "--base", small_teacher)
    assert (code, "--base is for single files that lack parts" in error) == (2, True)


def test_a_model_that_is_not_a_run_is_sampled_at_its_published_guidance(command: Command, tmp_path: Path) -> None:
    folder = FAMILY_BUILDERS["sd3"](tmp_path / "model")
    code, output, error = command("sample", folder, "--steps", 1, "--prompt", "red heart", "--output", "out")
    assert (code, error) == (0, "")
    assert "guidance scale 4.5" in output


def test_an_image_is_where_sampling_starts(command: Command, run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")

    def pixels(*options: Any) -> np.ndarray:
        folder = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        code, _, error = command("sample", run, *SMALL, "--image", "red.png", "--output", folder, *options)
        assert code == 0, error
        return np.asarray(Image.open(next(folder.glob("*.png"))), dtype=float)

    kept = pixels("--strength", 0.5)
    assert kept.shape[:2] == (8, 24)  # of the image, at the area of 16 x 16, in multiples of 8
    changed = pixels("--strength", 1)
    assert np.abs(kept - changed).max() > 0
    assert pixels("--width", 32, "--height", 16).shape[:2] == (16, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", 0.5], "--strength is for --image"),
        (
            ["--image", "red.png", "--strength", 0.4],
            "--strength 0.4 of 2 steps leaves none to take; raise --steps to at least 3",
        ),
        (["--mask", "red.png"], "--mask needs --image"),
    ],
)
def test_what_image_to_image_refuses(
    command: Command, run: Path, tmp_path: Path, words: list[Any], message: str
) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    code, _, error = command("sample", run, *SMALL, *words)
    assert code == 2
    assert error.startswith(f"Error: {message}")


def test_another_scheduler(command: Command, run: Path) -> None:
    assert "made for the" not in command("sample", run, *SMALL, "--scheduler", "lcm", "--output", "lcm")[1]
    code, output, _ = command("sample", run, *SMALL, "--sampler", "euler", "--output", "euler")
    assert code == 0
    assert "this model is made for the LCM sampler; with euler it may give poor images" in output
    one, other = (np.asarray(Image.open(next(Path(name).glob("*.png")))) for name in ("lcm", "euler"))
    assert (one != other).any()


def test_after_ctrl_c_the_finished_images_are_kept(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = sampling.generate

    def interrupted(pipeline: Any, prompts: Any, seeds: Any, *, on_images: Any, **options: Any) -> None:
        generate(pipeline, prompts[:1], seeds[:1], on_images=on_images, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "generate", interrupted)
    code, _, error = command("sample", run, *SMALL, "--num-images", 3)
    assert code == 130
    assert "stopped after 1 of 3 images; they are in runs/mine/images" in error.replace(f"{Path.cwd()}/", "")
    assert len(list((run / "images").iterdir())) == 1
