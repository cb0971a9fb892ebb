"""Sampling: models, sizes, precision and guidance; images do not depend on the batch size."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcmdistill.config.guidance import OmegaRange
from lcmdistill.sampling.generate import (
    ModelToSample,
    find_model,
    generate,
    guidance_warning,
    image_size,
    load_student,
    read_image_and_mask,
    sampling_dtype,
)
from lcmdistill.sampling.png import GeneratedImage
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.images import newest_image
from tests.support.teachers import Command


@pytest.fixture(scope="module")
def student(small_run: Path) -> Any:
    return load_student(str(small_run / "pipeline"), torch.device("cpu"))


def pixels(images: list[GeneratedImage]) -> np.ndarray:
    return np.stack([np.asarray(each.image, dtype=float) for each in images])


@pytest.mark.parametrize("steps", [1, 4])
def test_an_image_does_not_depend_on_its_batch(student: Any, steps: int) -> None:
    prompts, seeds = ["red heart", "grinning face", "dog face"], [0, 1, 2]
    options: dict[str, Any] = {"steps": steps, "guidance_scale": 4.0, "size": 16}
    single = pixels(generate(student, prompts, seeds, batch_size=1, **options))
    batched = pixels(generate(student, prompts, seeds, batch_size=3, **options))
    assert np.abs(single - batched).max() <= 1
    assert np.abs(single[0] - single[1]).max() > 1
    reverse = generate(student, prompts[::-1], seeds[::-1], batch_size=2, **options)
    assert [(each.prompt, each.seed) for each in reverse] == [("dog face", 2), ("grinning face", 1), ("red heart", 0)]
    assert np.abs(pixels(reverse)[::-1] - single).max() <= 1


def test_progress_is_reported(student: Any) -> None:
    done: list[int] = []
    options: Any = {"steps": 1, "guidance_scale": 4.0, "size": 16, "batch_size": 2}
    generate(student, ["a"] * 5, range(5), **options, on_images=lambda images: done.append(len(images)))
    assert done == [2, 2, 1]


def test_the_metadata_names_the_scheduler_in_use(command: Command, tmp_path: Path, small_teacher: Path) -> None:
    assert command("sample", small_teacher, "--prompt", "dog face", "--steps", 2, "--output", "out")[0] == 0
    text = getattr(Image.open(newest_image(tmp_path / "out")), "text")  # noqa: B009
    assert text["sampler"] == "DDIM"
    assert "loras" not in text


def test_a_run_brings_its_recorded_settings(small_run: Path, small_teacher: Path) -> None:
    found = find_model(str(small_run))
    assert found.path == str(small_run / "pipeline")
    assert (found.resolution, found.teacher) == (16, str(small_teacher))
    assert found.guidance_scale == 4.0  # omega 3, the middle of 1 to 5, plus 1
    assert (found.precision, found.omegas, found.is_baked) == ("auto", OmegaRange(1.0, 5.0), False)
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


def test_another_programs_config_is_not_a_run(tmp_path: Path, small_run: Path) -> None:
    shutil.copytree(small_run / "pipeline", tmp_path / "model")
    (tmp_path / "model" / "config.toml").write_text("[tool]\nx = 1\n")
    assert find_model(str(tmp_path / "model")).path == str(tmp_path / "model")


def test_the_command_without_arguments_samples_the_newest_run(
    command: Command, tmp_path: Path, small_run: Path
) -> None:
    shutil.copytree(small_run, tmp_path / "runs" / "small-lcm")
    code, output, _ = command("sample", "--steps", 2)
    assert code == 0
    folder = "runs/small-lcm/images"
    assert re.search(rf"\d+ images at 2 steps, guidance scale 4: {folder}, all in {folder}/grid_2-steps", output)
    assert len(list((tmp_path / folder).glob("*_2-steps_cfg-4_seed-?.png"))) >= 4


def test_prompts_seeds_and_image_counts(command: Command, tmp_path: Path, small_run: Path) -> None:
    (tmp_path / "prompts.txt").write_text("dog face\n\ncat face\n")
    options = ["--prompt", "red heart", "--prompts", "prompts.txt", "--num-images", 2, "--seed", 5, "--output", "out"]
    code, _, _ = command("sample", small_run, *options, "--steps", 1, "--guidance-scale", 3, "--resolution", 24)
    assert code == 0
    names = ["red-heart", "red-heart", "dog-face", "dog-face", "cat-face", "cat-face"]
    paths = [tmp_path / "out" / f"00{i}-{name}_1-step_cfg-3_seed-{5 + i}.png" for i, name in enumerate(names)]
    assert {*(tmp_path / "out").iterdir()} == {*paths, tmp_path / "out" / "grid_1-step_cfg-3_seed-5.png"}
    texts = [getattr(Image.open(path), "text") for path in paths]  # noqa: B009
    assert [text["seed"] for text in texts] == ["5", "6", "7", "8", "9", "10"]
    assert {(text["steps"], text["guidance_scale"]) for text in texts} == {("1", "3")}
    assert {Image.open(path).size for path in paths} == {(24, 24)}


def test_the_same_seed_gives_the_same_image(command: Command, tmp_path: Path, small_run: Path) -> None:
    for i, seed in enumerate([3, 3, 4]):
        command("sample", small_run, "--prompt", "dog face", "--seed", seed, "--steps", 2, "--output", f"out{i}")
    first, again, other = (Image.open(newest_image(tmp_path / f"out{i}")).tobytes() for i in range(3))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no finished run under runs/"),
        (["no-such-model"], "'no-such-model'"),
        (["{run}", "--steps", "51"], "--steps is 51; this model's scheduler has 50"),
        (["{run}", "--resolution", "20"], "--resolution is 20; it must be a multiple of 8: try 16"),
        (["{run}", "--width", "32", "--height", "20"], "--height is 20; it must be a multiple of 8: try 16"),
        (["{run}", "--width", "32", "--resolution", "32"], "pass either --resolution or --width and --height"),
        (["{run}", "--prompts", "absent.txt"], "--prompts absent.txt cannot be read"),
        (["{run}", "--output", "file.txt"], "--output file.txt is a file; specify a folder"),
        (["{run}", "--output", "file.txt/x"], "--output file.txt/x cannot be created (Not a directory)"),
        (["{run}", "--guidance-scale", "nan"], "--guidance-scale is nan; it must be a number from -1000 to 1000"),
        (["{run}", "--guidance-scale", "inf"], "--guidance-scale is inf; it must be a number from -1000 to 1000"),
        (["{run}", "--lora", "x", "--lora-scale", "nan"], "--lora-scale is nan; each must be a finite number"),
        (["{run}", "--device", "tpu-or-so"], "unknown --device 'tpu-or-so'"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(
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


def test_a_prompt_that_is_not_utf8_is_refused(command: Command, small_run: Path) -> None:
    code, _, error = command("sample", small_run, "--prompt", "a \udcff", "--steps", 1)
    assert (code, error.startswith("Error: --prompt 'a \\udcff' is not UTF-8")) == (2, True)


def test_a_size_need_not_be_square(command: Command, tmp_path: Path, small_run: Path) -> None:
    options = ["--prompt", "dog face", "--steps", 1, "--output", "out"]
    assert command("sample", small_run, *options, "--width", 32, "--height", 24)[0] == 0
    assert Image.open(newest_image(tmp_path / "out")).size == (32, 24)
    assert command("sample", small_run, *options, "--width", 32)[0] == 0
    assert Image.open(newest_image(tmp_path / "out")).size == (32, 16)  # 16 is the run's resolution


def test_the_options_of_the_image_size() -> None:
    run, folder = ModelToSample("m", resolution=512), ModelToSample("m")
    assert image_size(run, None, None, None) == 512
    assert image_size(run, 256, None, None) == 256
    assert image_size(run, None, 768, None) == (512, 768)
    assert image_size(folder, None, None, None) is None
    assert image_size(folder, None, 768, 256) == (256, 768)
    with pytest.raises(UsageError, match=r"--width needs the other side; pass --width and --height"):
        image_size(folder, None, 768, None)


@pytest.mark.parametrize(
    ("requested", "recorded", "device", "dtype"),
    [
        (None, "fp32", "cuda", torch.float32),
        (None, "bf16", "cuda", torch.bfloat16),
        (None, "fp16", "cuda", torch.float16),
        ("fp16", "bf16", "cuda", torch.float16),
        (None, "bf16", "cpu", torch.float32),
        (None, None, "cpu", torch.float32),
        ("bf16", "fp32", "cpu", torch.bfloat16),
    ],
)
def test_the_precision_is_that_of_the_run(
    requested: str | None, recorded: str | None, device: str, dtype: torch.dtype
) -> None:
    assert sampling_dtype(requested, recorded, torch.device(device)) == dtype


@pytest.mark.parametrize("has_bf16", [True, False])
def test_automatic_precision_is_that_of_training(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float16
    for recorded in ("auto", None):
        assert sampling_dtype(None, recorded, torch.device("cuda")) == expected


def test_the_networks_have_the_precision_and_the_vae_stays_in_fp32(
    command: Command, small_run: Path, tmp_path: Path
) -> None:
    pipeline = load_student(str(small_run / "pipeline"), torch.device("cpu"), dtype=torch.bfloat16)
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    images = []
    for precision in ("fp32", "bf16"):
        options = ["--prompt", "dog face", "--steps", 1, "--output", precision, "--precision", precision]
        assert command("sample", small_run, *options)[0] == 0
        images.append(np.asarray(Image.open(newest_image(tmp_path / precision)), dtype=float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 8


def test_images_of_nan_are_an_error(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = load_student(str(small_run / "pipeline"), torch.device("cpu"))
    options: dict[str, Any] = {"steps": 1, "guidance_scale": 4.0, "size": 16}
    monkeypatch.setattr(student.vae, "decode", lambda latents, **options: (latents[:, :3] * float("nan"),))
    with pytest.raises(RunError, match="generates NaN instead of images"):
        generate(student, ["a"], [0], **options)
    student.scheduler.register_to_config(prediction_type="evil")
    with pytest.raises(RunError, match=r"cannot generate images with these options \(ValueError: .*evil"):
        generate(student, ["a"], [0], **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    command: Command, small_run: Path, tmp_path: Path, value: float
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(small_run / "pipeline", folder)
    (folder / ".checksums.json").unlink()  # as of a pipeline that somebody else wrote
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, error = command("sample", folder, "--prompt", "dog face")
    assert (code, error.count("\n")) == (2, 1)
    assert f"{folder}: the weights of its unet contain NaN or Inf; its training diverged" in error


@pytest.mark.parametrize(
    ("is_baked", "scale", "sentence"),
    [
        (False, 2.0, None),
        (False, 6.0, None),
        (
            False,
            40.0,
            "guidance scale 40 is outside the range that this student was trained with; expect poor images, ",
        ),
        (False, 0.0, "guidance scale 0 is outside the range"),
        (True, 1.0, None),
        (
            True,
            3.0,
            "2 to 6 in its weights; guidance scale 3 applies CFG on top of it, at twice the cost: use 1",
        ),
        (True, 0.0, "guidance scale 0 has no effect: use 1"),
    ],
)
def test_guidance_outside_the_training_is_reported(is_baked: bool, scale: float, sentence: str | None) -> None:
    model = ModelToSample("m", omegas=OmegaRange(1.0, 5.0), is_baked=is_baked)
    warning = guidance_warning(model, scale)
    assert warning is None if sentence is None else sentence in (warning or "")
    assert guidance_warning(ModelToSample("m"), scale) is None
    recorded = ModelToSample("m", omegas=OmegaRange(1.0, 5.0), is_baked=True, guidance_scale=3.0)
    assert "use 1" in (guidance_warning(recorded, 3.0) or "")  # a run may record what does not fit


def test_the_command_reports_guidance_outside_the_training(command: Command, small_run: Path) -> None:
    for scale, reported in ((4, False), (40, True)):
        _, out, _ = command(
            "sample", small_run, "--prompt", "x", "--steps", 1, "--guidance-scale", scale, "--output", "out"
        )
        assert (
            "outside the range that this student was trained with; expect poor images, or use 2 to 6" in out
        ) == reported


def test_the_image_to_edit_is_read_like_a_training_image(tmp_path: Path) -> None:
    upright = Image.new("RGB", (8, 16), "red")
    upright.paste("blue", (0, 8, 8, 16))
    exif = Image.Exif()
    exif[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    mask = tmp_path / "mask.png"
    pairs = {name: read_image_and_mask(tmp_path / f"{name}.png", mask) for name in ("photo", "clear", "deep")}
    images: dict[str, Any] = {name: pair[0] for name, pair in pairs.items()}
    assert images["photo"].tobytes() == upright.tobytes()
    assert images["clear"].getpixel((0, 0)) == (255, 255, 255)
    assert images["deep"].getpixel((0, 0)) == (77, 77, 77)
    white: Any = pairs["photo"][1]
    assert (white.mode, white.getpixel((0, 0))) == ("L", 255)
    unmasked: Any = read_image_and_mask(tmp_path / "clear.png", tmp_path / "clear.png")[1]
    assert unmasked.getpixel((0, 0)) == 0
    (tmp_path / "broken.png").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match=r"^--image .*broken\.png cannot be read: [\w ]+; pass a PNG"):
        read_image_and_mask(tmp_path / "broken.png", mask)
