"""A teacher's parts as the user wants them: its VAE and how that computes, CLIP's layers, long prompts, a safety checker."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from lcmdistill.export.diffusers_pipeline import save_pipeline
from lcmdistill.sampling.generate import generate, load_student
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.pipelines import pipeline_latents
from lcmdistill.utils.errors import UsageError
from tests.support.models import opened
from tests.support.overrides import noise, same_weights
from tests.support.teachers import SMALL, Command, edited


def guided(teacher: Teacher, latents: Tensor, scale: float) -> Tensor:
    """One step of DDIM from the end, on the teacher's own door."""
    import diffusers

    scheduler: Any = diffusers.DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
    scheduler.set_timesteps(1)
    blank = teacher.example(1, 8 * teacher.vae_factor, "cpu")[2]
    c, n = (blank.with_prompt(teacher.encode_prompts([text])).values for text in ("a cat", ""))
    (t,) = scheduler.timesteps
    with torch.no_grad():
        cond, null = (teacher.call(teacher.network, latents, t[None], prompt, None) for prompt in (c, n))
    return scheduler.step(null + scale * (cond - null), t, latents).prev_sample


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_teacher_and_its_student_sample_with_as_many_layers(
    family: str, zeros: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    index = "model_index.json"
    rule = {"force_zeros_for_empty_prompt": zeros} if family == "sdxl" else {}
    folder = edited(folders[family], tmp_path / "m", index, lambda tree: {**tree, **rule})
    teacher = load_teacher(str(folder), clip_skip=1)
    options: dict[str, Any] = {"steps": 1, "guidance_scale": 3.0, "scheduler": "DDIMScheduler"}
    drawn = teacher.generate_latents(["a cat"], noise(), **options)
    torch.testing.assert_close(drawn, guided(teacher, noise(), 3.0), rtol=1e-4, atol=1e-4)
    plain = load_teacher(str(folder)).generate_latents(["a cat"], noise(), **options)
    assert (plain - drawn).abs().max() > 4e-4
    # The student's pipeline, as files and given the same values as options.
    student = student_pipeline(teacher, teacher.network)
    save_pipeline(student, tmp_path / "student", "")
    latents = [
        pipeline_latents(
            load_pipeline(str(tmp_path / "student"), clip_skip=skip), ["a cat"], noise(), steps=1, guidance_scale=3.0
        )
        for skip in (None, 1)
    ]
    expected = pipeline_latents(student, ["a cat"], noise(), steps=1, guidance_scale=3.0)
    for each in latents:  # weights from a file may be aligned differently, and some processors then round otherwise
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=3e-4)
    if family == "sd2":  # whoever reads the files follows
        read: Any = opened(tmp_path / "student")
        read.set_progress_bar_config(disable=True)
        again = pipeline_latents(read, ["a cat"], noise(), steps=1, guidance_scale=3.0)
        torch.testing.assert_close(again, expected, rtol=1e-3, atol=3e-4)
        assert read.text_encoder.config.num_hidden_layers == 3
    elif zeros:  # diffusers' own word for it
        read = opened(tmp_path / "student")
        own = read(
            "a cat",
            latents=noise(),
            num_inference_steps=1,
            guidance_scale=3.0,
            clip_skip=1,
            output_type="latent",
            height=32,
            width=32,
        ).images
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=3e-4)


def test_a_clip_skip_that_cannot_be_is_refused(folders: dict[str, Path]) -> None:
    for family, skip, message in (
        ("pixart", 1, "needs CLIP text encoders, and a PixArtAlphaPipeline has none"),
        ("sd1", 1, "this teacher's text encoder can skip 0 to 0 of its layers"),
        ("sdxl", 2, "skip 0 to 1 of its layers"),
    ):
        with pytest.raises(UsageError, match=message):
            load_teacher(str(folders[family]), clip_skip=skip)


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_samples_with_the_layers_that_it_was_trained_with(
    kind: str, folders: dict[str, Path], image_folder: Path, tmp_path: Path, command: Command
) -> None:
    settings = {**SMALL, "data.resolution": 32, "run.validate_every": 1, "run.validation_prompts": '["a cat"]'}
    sets = [f"--set={key}={value}" for key, value in {**settings, "optim.max_train_steps": 1}.items()]
    name = "distill-lora" if kind == "lora" else "distill"
    rank = ["--rank", 2] if kind == "lora" else []
    base = [name, "--teacher", folders["sdxl"], "--data", image_folder, "--output", tmp_path / "run", *sets, *rank]
    code, _, error = command(*base, "--clip-skip", 1)
    assert (code, error) == (0, ""), error
    images = {}
    for options in ([], ["--clip-skip", 1], ["--clip-skip", 0]):
        where = tmp_path / f"samples-{len(images)}"
        code, _, error = command("sample", tmp_path / "run", "--prompt", "a cat", "--output", where, *options)
        assert (code, error) == (0, ""), error
        images[str(options)] = next(where.glob("*.png")).read_bytes()
    own, one, none = images.values()
    assert (own == one, none != own) == (True, True)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "`clip_skip=1`, A1111's clip skip 3" in card
    assert "clip_skip=1)" in card
    code, output, _ = command("info", tmp_path / "run")
    assert "1 (diffusers counting)" in output


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path) -> Path:
    """The small teacher with a safety checker that finds fault with everything."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)  # thresholds that every cosine is above
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    plain: Any = opened(small_teacher)
    folder = tmp_path_factory.mktemp("checked") / "model"
    parts = {**plain.components, "safety_checker": checker, "feature_extractor": extractor}
    type(plain)(**parts, requires_safety_checker=True).save_pretrained(folder)
    return folder


def black(drawings: list[Any]) -> bool:
    return not any(np.asarray(drawing.image).any() for drawing in drawings)


@pytest.mark.parametrize("drop", [False, True])
def test_a_safety_checker_goes_along_unless_it_is_dropped_by_name(
    drop: bool, checked: Path, image_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("latents have nothing to be checked")

    settings = {**SMALL, "run.validate_every": 1, "run.validation_prompts": '["a cat"]', "data.teacher_steps": 1}
    sets = [f"--set={key}={value}" for key, value in {**settings, "optim.max_train_steps": 1}.items()]
    base = ["distill", "--teacher", checked, "--data", image_folder, "--data", "teacher", *sets]
    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusionSafetyChecker, "forward", never)
        left_out = ["--drop", "safety_checker"] if drop else []
        code, _, error = command(*base, "--set=data.max_samples=4", "--output", tmp_path / "run", *left_out)
    assert (code, error) == (0, ""), error
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is not drop
    assert (index["safety_checker"][0] is None, (tmp_path / "run/pipeline/safety_checker").is_dir()) == (drop, not drop)
    assert ("without the teacher's safety checker" in (tmp_path / "run" / "README.md").read_text()) is drop
    pipeline = load_student(str(tmp_path / "run" / "pipeline"), torch.device("cpu"))
    assert black(generate(pipeline, ["a cat"], [0], steps=1, guidance_scale=4.0, size=16)) is not drop
    if drop:
        return
    assert same_weights(pipeline.safety_checker, opened(checked).safety_checker)
    # As transformers 4 names them, which takes random weights for what it does not find.
    names = load_file(tmp_path / "run" / "pipeline" / "safety_checker" / "model.safetensors")
    assert sum(name.startswith("vision_model.vision_model.") for name in names) == len(names) - 5


def test_a_part_that_cannot_be_left_out_is_refused(command: Command) -> None:
    code, _, error = command("distill", "--teacher", "tiny", "--drop", "unet")
    assert (code, "only safety_checker and text_encoder_3 can be dropped" in error) == (2, True)
