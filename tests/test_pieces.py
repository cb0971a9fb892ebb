"""A teacher's parts as the user wants them: its VAE and how that computes, CLIP's layers, long prompts, a safety checker."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Command, build_teacher
from safetensors.torch import load_file, save_file
from small_models import FAMILY_BUILDERS, opened, small_vae
from test_teachers import edited
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.latent_cache import cache_folder, prepare
from lcmdistill.export.diffusers_pipeline import save_pipeline
from lcmdistill.export.sd_keys import original_vae
from lcmdistill.sampling.generate import draw, load_student
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.teachers import overrides as pieces
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.pipelines import pipeline_latents
from lcmdistill.utils.errors import RunError, UsageError


def built(folder: Path, family: str) -> Path:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        return FAMILY_BUILDERS[family](folder / family)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> diffusers folder of a small random model."""
    return {name: built(tmp_path_factory.mktemp(name), name) for name in ("sd1", "sd2", "sdxl", "pixart")}


def noise(batch: int = 1, side: int = 8) -> Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0))


def images(batch: int = 2, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def same_weights(a: Any, b: Any) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


# -- another VAE -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the same shapes and other weights, whose VAE is to be taken."""
    return build_teacher(tmp_path_factory.mktemp("other") / "model", seed=7)


def as_pipeline(other: Path, to: Path) -> Path:
    return other


def as_folder(other: Path, to: Path) -> Path:
    return other / "vae"


def as_file(other: Path, to: Path) -> Path:
    shutil.copy(other / "vae" / "diffusion_pytorch_model.safetensors", to / "vae.safetensors")
    return to / "vae.safetensors"


def as_original_file(other: Path, to: Path) -> Path:
    """The layout of the VAEs that are shared beside checkpoints."""
    vae = opened(other).vae
    tensors = {
        k.removeprefix("first_stage_model."): v.contiguous()
        for k, v in original_vae(vae.state_dict(), vae.config).items()
    }
    save_file(tensors, to / "vae.safetensors")
    return to / "vae.safetensors"


@pytest.mark.parametrize("form", [as_pipeline, as_folder, as_file, as_original_file])
def test_a_teacher_takes_another_vae(
    form: Callable[[Path, Path], Path], other: Path, small_teacher: Path, tmp_path: Path
) -> None:
    own, theirs = load_teacher(str(small_teacher)), load_teacher(str(other))
    teacher = load_teacher(str(small_teacher), vae=str(form(other, tmp_path)))
    assert same_weights(teacher.vae, theirs.vae)
    assert not same_weights(teacher.vae, own.vae)
    assert same_weights(teacher.network, own.network)
    for mine, expected in zip(teacher.encode_images(images()), theirs.encode_images(images()), strict=True):
        assert torch.equal(mine, expected)
    assert {(p.requires_grad, p.dtype) for p in teacher.vae.parameters()} == {(False, torch.float32)}
    assert len({t.fingerprint(with_network=False) for t in (own, teacher)}) == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"scaling_factor": 0.25},
            "a scaling factor of 0.25 and the teacher's network was trained on a scaling factor of 0.5",
        ),
        ({"shift_factor": 0.1}, "has a shift of 0.1"),
        (
            {"_class_name": "AutoencoderTiny"},
            "is a AutoencoderTiny; the latents of a distillation need an AutoencoderKL",
        ),
    ],
)
def test_a_vae_of_another_family_is_refused(
    values: dict[str, Any], said: str, other: Path, small_teacher: Path, tmp_path: Path
) -> None:
    folder = edited(other, tmp_path / "m", "vae/config.json", lambda config: {**config, **values})
    with pytest.raises(UsageError, match=said):
        load_teacher(str(small_teacher), vae=str(folder))


def test_what_is_no_vae_of_the_teacher_s_is_refused_in_one_sentence(
    other: Path, small_teacher: Path, tmp_path: Path
) -> None:
    small_vae(scaling_factor=0.5).save_pretrained(tmp_path / "factor")
    as_file(other, tmp_path)
    tensors = load_file(tmp_path / "vae.safetensors")
    save_file({k: v for k, v in tensors.items() if "decoder" not in k}, tmp_path / "half.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "rubbish.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "vae.safetensors").read_bytes()[:-100])
    shutil.copytree(other / "vae", tmp_path / "half")
    save_file(
        {k: v for k, v in tensors.items() if "decoder" not in k},
        tmp_path / "half" / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    torch.save(tensors, tmp_path / "vae.pt")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "factor": "a downscale factor of 4 and the teacher's network was trained on a downscale factor of 2",
        "half.safetensors": "cannot be read as a VAE: weights are missing",
        "rubbish.safetensors": "cannot be read as a VAE",
        "cut.safetensors": "100 bytes are missing at its end",
        "half": r"half lacks \d+ weights, such as decoder",
        "vae.pt": "is no .safetensors file; a pickle can run any code",
        "empty": "cannot be read as a VAE",
        "absent": "there is none; give a diffusers folder",
    }.items():
        with pytest.raises(UsageError, match=said) as caught:
            load_teacher(str(small_teacher), vae=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="is not in the local cache and the hub cannot be reached"):
        load_teacher(str(small_teacher), vae="owner/no-such-vae")


def test_a_run_carries_its_vae_and_is_not_resumed_with_another(
    other: Path, small_teacher: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    sets = [f"--set={key}={value}" for key, value in {**SMALL, "run.validate_every": 2}.items()]
    base = ["distill", "--teacher", small_teacher, "--data", image_folder, "--output", tmp_path / "run", *sets]
    code, _, error = command(*base, "--vae", other / "vae")
    assert (code, error) == (0, ""), error
    assert same_weights(opened(tmp_path / "run" / "pipeline").vae, opened(other).vae)
    assert "the VAE is `vae`, in place of the teacher" in (tmp_path / "run" / "README.md").read_text()
    code, _, error = command(*base)
    assert (code, "teacher.vae" in error, error.count("\n")) == (2, True, 1)


def test_a_run_that_is_older_than_a_setting_had_its_default(
    small_teacher: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    sets = [f"--set={key}={value}" for key, value in SMALL.items()]
    base = ["distill", "--teacher", small_teacher, "--data", image_folder, "--output", tmp_path / "run", *sets]
    assert command(*base, "--max-train-steps", 2)[0] == 0
    config = tmp_path / "run" / "config.toml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("vae_")))
    assert command(*base, "--max-train-steps", 3)[0] == 0
    config.write_text("\n".join(line for line in lines if not line.startswith("vae_")))
    code, _, error = command(*base, "--max-train-steps", 4, "--set", "teacher.vae_tiling=true")
    assert (code, "teacher.vae_tiling = False" in error) == (2, True), error


# -- how it computes ---------------------------------------------------------------------------------------------------


def test_a_vae_computes_in_fp32_whatever_stands_around_it(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    mean, _ = teacher.encode_images(images())
    shown = teacher.decode(mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.encode_images(images())[0], mean)
        assert torch.equal(teacher.decode(mean), shown)
    told = load_teacher(str(small_teacher), vae_dtype="bf16")
    half, _ = told.encode_images(images())
    assert half.dtype == torch.float32
    assert 1e-4 < (half - mean).abs().max() < 0.1
    assert 1e-4 < (told.decode(mean) - shown).abs().max() < 0.1
    assert same_weights(told.vae, teacher.vae)  # what is exported has lost nothing
    assert told.fingerprint(with_network=False) != teacher.fingerprint(with_network=False)


def test_a_vae_that_overflows_in_fp16_is_fine_unless_told(
    small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    """As SDXL's own does: activations beyond 65504 that a norm brings back."""
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for part in ("encoder", "decoder"):
        tensors[f"{part}.conv_in.weight"] *= 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    config = DataConfig(sources=(str(image_folder),), resolution=16, cache_dir=str(tmp_path / "cache"))
    teacher = load_teacher(str(folder))
    prepare(str(image_folder), config, teacher, 0)
    assert teacher.decode(noise()).isfinite().all()
    with pytest.raises(RunError, match="not finite; its weights may be broken or need fp32"):
        prepare(str(image_folder), config, load_teacher(str(folder), vae_dtype="fp16"), 0)


def test_images_are_decoded_in_fp32_around_half_a_network(small_run: Path) -> None:
    """What sampling on a GPU does."""
    options: dict[str, Any] = {"steps": 1, "guidance_scale": 4.0, "resolution": 16}
    pipeline = load_student(str(small_run / "pipeline"), torch.device("cpu"))
    pipeline.to(torch.bfloat16)
    pipeline.vae.float()
    decoded: list[Tensor] = []
    decode = pipeline.vae.decode

    def watched(z: Tensor, *args: Any, **told: Any) -> Any:
        decoded.append(out := decode(z, *args, **told)[0])
        return (out,)

    pipeline.vae.decode = watched
    (drawing,) = draw(pipeline, ["red heart"], [0], **options)
    assert decoded[0].dtype == torch.float32
    whole = (decoded[0][0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(drawing.image) - whole * 255).max() <= 0.51


def test_tiles_are_of_half_a_thousand_pixels_and_one_image_at_a_time(
    small_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TILE", 16)
    plain, tiled = (load_teacher(str(small_teacher), vae_tiling=on) for on in (False, True))
    seen: list[torch.Size] = []
    for coder in (tiled.vae.encoder, tiled.vae.decoder):
        coder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    mean, _ = tiled.encode_images(images(2, 32))
    assert ({shape[0] for shape in seen}, max(max(shape[2:]) for shape in seen)) == ({1}, 16)
    seen.clear()
    tiled.decode(mean)
    assert ({shape[0] for shape in seen}, max(max(shape[2:]) for shape in seen)) == ({1}, 8)
    reference: Any = opened(small_teacher).vae
    reference.enable_tiling()
    reference.tile_sample_min_size, reference.tile_latent_min_size = 16, 8
    with torch.no_grad():
        expected = reference.encode(images(2, 32)).latent_dist.mean * 0.5
    torch.testing.assert_close(mean, expected)
    assert plain.encode_images(images(2, 32))[0].shape == mean.shape
    assert tiled.fingerprint(with_network=False) != plain.fingerprint(with_network=False)


# -- clip skip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "skip"), [("sd2", 1), ("sd2", 2), ("sdxl", 1)])
def test_prompts_are_what_diffusers_makes_of_them_without_clip_s_last_layers(
    family: str, skip: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened(folders[family])
    # diffusers 0.42 looks for what transformers from 5.6 on have no more.
    if not hasattr(pipeline.text_encoder, "text_model"):
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        expected = pipeline.encode_prompt(["a cat", "a dog"], **options, clip_skip=skip)
        null = pipeline.encode_prompt([""], **options, clip_skip=skip)[0]
        unskipped = pipeline.encode_prompt(["a cat", "a dog"], **options)[0]
    teacher = load_teacher(str(folders[family]), clip_skip=skip)
    told = teacher.encode_prompts(["a cat", "a dog"])
    assert torch.equal(told["prompt_embeds"], expected[0])
    assert (told["prompt_embeds"] - unskipped).abs().max() > 0.1
    if family == "sdxl":
        assert torch.equal(told["pooled"], expected[2])
        assert not teacher.encode_prompts([""])["prompt_embeds"].any()  # by SDXL's own rule
    else:
        assert torch.equal(teacher.encode_prompts([""])["prompt_embeds"], null)
    plain = load_teacher(str(folders[family]))
    assert plain.fingerprint(with_network=False) != teacher.fingerprint(with_network=False)
    config = DataConfig(sources=("teacher",))
    assert len({cache_folder("teacher", config, each, 0) for each in (plain, teacher)}) == 2


def guided(teacher: Teacher, latents: Tensor, scale: float) -> Tensor:
    """One step of DDIM from the end, on the teacher's own door."""
    import diffusers

    scheduler: Any = diffusers.DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
    scheduler.set_timesteps(1)
    blank = teacher.example(1, 8 * teacher.vae_factor, "cpu")[2]
    c, n = (blank.with_prompt(teacher.encode_prompts([text])).values for text in ("a cat", ""))
    (t,) = scheduler.timesteps
    with torch.no_grad():
        cond, null = (teacher.call(teacher.network, latents, t[None], told, None) for told in (c, n))
    return scheduler.step(null + scale * (cond - null), t, latents).prev_sample


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_teacher_and_its_student_draw_with_as_many_layers(
    family: str, zeros: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    index = "model_index.json"
    rule = {"force_zeros_for_empty_prompt": zeros} if family == "sdxl" else {}
    folder = edited(folders[family], tmp_path / "m", index, lambda tree: {**tree, **rule})
    teacher = load_teacher(str(folder), clip_skip=1)
    options: dict[str, Any] = {"steps": 1, "guidance_scale": 3.0, "scheduler": "DDIMScheduler"}
    drawn = teacher.draw_latents(["a cat"], noise(), **options)
    torch.testing.assert_close(drawn, guided(teacher, noise(), 3.0), rtol=1e-4, atol=1e-4)
    plain = load_teacher(str(folder)).draw_latents(["a cat"], noise(), **options)
    assert (plain - drawn).abs().max() > 1e-4
    # The student's pipeline, as files and told again what is in them.
    student = student_pipeline(teacher, teacher.network)
    save_pipeline(student, tmp_path / "student", "")
    latents = [
        pipeline_latents(
            load_pipeline(str(tmp_path / "student"), clip_skip=skip), ["a cat"], noise(), steps=1, guidance_scale=3.0
        )
        for skip in (None, 1)
    ]
    expected = pipeline_latents(student, ["a cat"], noise(), steps=1, guidance_scale=3.0)
    assert all(torch.equal(each, expected) for each in latents)
    if family == "sd2":  # whoever reads the files follows
        read: Any = opened(tmp_path / "student")
        read.set_progress_bar_config(disable=True)
        assert torch.equal(pipeline_latents(read, ["a cat"], noise(), steps=1, guidance_scale=3.0), expected)
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
        torch.testing.assert_close(own, expected)


def test_a_clip_skip_that_cannot_be_is_refused(folders: dict[str, Path]) -> None:
    for family, skip, said in (
        ("pixart", 1, "is for text encoders that are CLIP's, and a PixArtAlphaPipeline has none"),
        ("sd1", 1, "this teacher's text encoder can do without 0 to 0 of its layers"),
        ("sdxl", 2, "without 0 to 1 of its layers"),
    ):
        with pytest.raises(UsageError, match=said):
            load_teacher(str(folders[family]), clip_skip=skip)


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_samples_with_the_layers_that_it_was_trained_with(
    kind: str, folders: dict[str, Path], image_folder: Path, tmp_path: Path, command: Command
) -> None:
    sets = [f"--set={key}={value}" for key, value in {**SMALL, "data.resolution": 32, "run.validate_every": 4}.items()]
    name = "distill-lora" if kind == "lora" else "distill"
    rank = ["--rank", 2] if kind == "lora" else []
    base = [name, "--teacher", folders["sdxl"], "--data", image_folder, "--output", tmp_path / "run", *sets, *rank]
    code, _, error = command(*base, "--clip-skip", 1)
    assert (code, error) == (0, ""), error
    drawn = {}
    for told in ([], ["--clip-skip", 1], ["--clip-skip", 0]):
        where = tmp_path / f"samples-{len(drawn)}"
        code, _, error = command("sample", tmp_path / "run", "--prompt", "a cat", "--output", where, *told)
        assert (code, error) == (0, ""), error
        drawn[str(told)] = (where / "grid.png").read_bytes()
    own, one, none = drawn.values()
    assert (own == one, none != own) == (True, True)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "`clip_skip=1`, A1111's clip skip 3" in card
    assert "clip_skip=1)" in card
    code, told, _ = command("info", tmp_path / "run")
    assert "1, as diffusers counts" in told


# -- a safety checker --------------------------------------------------------------------------------------------------


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

    sets = [f"--set={key}={value}" for key, value in {**SMALL, "run.validate_every": 2, "data.draw_steps": 1}.items()]
    base = ["distill", "--teacher", checked, "--data", image_folder, "--data", "teacher", *sets]
    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusionSafetyChecker, "forward", never)
        left_out = ["--drop", "safety_checker"] if drop else []
        code, _, error = command(*base, "--set=data.count=4", "--output", tmp_path / "run", *left_out)
    assert (code, error) == (0, ""), error
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is not drop
    assert (index["safety_checker"][0] is None, (tmp_path / "run/pipeline/safety_checker").is_dir()) == (drop, not drop)
    assert ("without the teacher's safety checker" in (tmp_path / "run" / "README.md").read_text()) is drop
    pipeline = load_student(str(tmp_path / "run" / "pipeline"), torch.device("cpu"))
    assert black(draw(pipeline, ["a cat"], [0], steps=1, guidance_scale=4.0, resolution=16)) is not drop
    if drop:
        return
    assert same_weights(pipeline.safety_checker, opened(checked).safety_checker)
    # As transformers 4 names them, which takes random weights for what it does not find.
    names = load_file(tmp_path / "run" / "pipeline" / "safety_checker" / "model.safetensors")
    assert sum(name.startswith("vision_model.vision_model.") for name in names) == len(names) - 5


def test_a_part_that_cannot_be_left_out_is_refused(command: Command) -> None:
    code, _, error = command("distill", "--teacher", "tiny", "--drop", "unet")
    assert (code, "what can be left out is safety_checker" in error) == (2, True)
