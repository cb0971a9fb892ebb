"""A teacher's parts as the user wants them: its VAE and how that computes, CLIP's layers, long prompts, a safety checker."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from lcmdistill.config.schema import DataConfig
from lcmdistill.export.single_file import write_single_file
from lcmdistill.sampling.generate import generate, load_student
from lcmdistill.teachers import overrides as pieces
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.single_file.sd_keys import original_vae
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import cache_of, prepared
from tests.support.models import opened, small_vae
from tests.support.overrides import images, noise, same_weights
from tests.support.teachers import SMALL, Command, build_teacher, edited


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


def test_the_vae_inside_a_checkpoint_has_the_scale_of_files(other: Path, small_teacher: Path, tmp_path: Path) -> None:
    write_single_file(opened(other), tmp_path / "other.safetensors", dtype=torch.float32)
    with pytest.raises(
        UsageError, match=r"has a scaling factor of 0\.18215 and the teacher's network was trained on .* 0\.5"
    ):
        load_teacher(str(small_teacher), vae=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("values", "message"),
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
    values: dict[str, Any], message: str, other: Path, small_teacher: Path, tmp_path: Path
) -> None:
    folder = edited(other, tmp_path / "m", "vae/config.json", lambda config: {**config, **values})
    with pytest.raises(UsageError, match=message):
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
    for name, message in {
        "factor": "a downscale factor of 4 and the teacher's network was trained on a downscale factor of 2",
        "half.safetensors": "cannot be read as a VAE: weights are missing",
        "rubbish.safetensors": "cannot be read as a VAE",
        "cut.safetensors": "100 bytes are missing at its end",
        "half": r"half lacks \d+ weights, such as decoder",
        "vae.pt": "is not a .safetensors file; a pickle can run any code",
        "empty": "cannot be read as a VAE",
        "absent": "does not exist; use a diffusers folder",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            load_teacher(str(small_teacher), vae=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="is not in the local cache and the hub cannot be reached"):
        load_teacher(str(small_teacher), vae="owner/no-such-vae")


def test_a_run_carries_its_vae_and_is_not_resumed_with_another(
    other: Path, small_teacher: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    sets = [
        f"--set={key}={value}"
        for key, value in {**SMALL, "run.validate_every": 4, "run.validation_prompts": '["a cat"]'}.items()
    ]
    base = ["distill", "--teacher", small_teacher, "--data", image_folder, "--output", tmp_path / "run", *sets]
    code, _, error = command(*base, "--vae", other / "vae")
    assert (code, error) == (0, ""), error
    assert same_weights(opened(tmp_path / "run" / "pipeline").vae, opened(other).vae)
    assert "uses the VAE `vae` instead of the teacher's" in (tmp_path / "run" / "README.md").read_text()
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
    config.write_text("\n".join([*(line for line in lines if not line.startswith("vae_")), "# checksum: any"]))
    assert command(*base, "--max-train-steps", 3)[0] == 0
    config.write_text("\n".join([*(line for line in lines if not line.startswith("vae_")), "# checksum: any"]))
    code, _, error = command(*base, "--max-train-steps", 4, "--set", "teacher.vae_tiling=true")
    assert (code, "teacher.vae_tiling = False" in error) == (2, True), error


def test_a_vae_computes_in_fp32_whatever_stands_around_it(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    mean, _ = teacher.encode_images(images())
    shown = teacher.decode(mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.encode_images(images())[0], mean)
        assert torch.equal(teacher.decode(mean), shown)
    in_bf16 = load_teacher(str(small_teacher), vae_dtype="bf16")
    half, _ = in_bf16.encode_images(images())
    assert half.dtype == torch.float32
    assert 1e-4 < (half - mean).abs().max() < 0.1
    assert 1e-4 < (in_bf16.decode(mean) - shown).abs().max() < 0.1
    assert same_weights(in_bf16.vae, teacher.vae)  # what is exported has lost nothing
    assert in_bf16.fingerprint(with_network=False) != teacher.fingerprint(with_network=False)


def test_a_vae_that_overflows_in_fp16_works_by_default(small_teacher: Path, image_folder: Path, tmp_path: Path) -> None:
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
    prepared(str(image_folder), config, teacher, 0)
    assert teacher.decode(noise()).isfinite().all()
    with pytest.raises(RunError, match="not finite; its weights may be broken or need fp32"):
        prepared(str(image_folder), config, load_teacher(str(folder), vae_dtype="fp16"), 0)


def test_images_are_decoded_in_fp32_around_half_a_network(small_run: Path) -> None:
    """What sampling on a GPU does."""
    options: dict[str, Any] = {"steps": 1, "guidance_scale": 4.0, "size": 16}
    pipeline = load_student(str(small_run / "pipeline"), torch.device("cpu"))
    pipeline.to(torch.bfloat16)
    pipeline.vae.float()
    decoded: list[Tensor] = []
    decode = pipeline.vae.decode

    def watched(z: Tensor, *args: Any, **options: Any) -> Any:
        decoded.append(out := decode(z, *args, **options)[0])
        return (out,)

    pipeline.vae.decode = watched
    (drawing,) = generate(pipeline, ["red heart"], [0], **options)
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
    condition = teacher.encode_prompts(["a cat", "a dog"])
    assert torch.equal(condition["prompt_embeds"], expected[0])
    assert (condition["prompt_embeds"] - unskipped).abs().max() > 0.1
    if family == "sdxl":
        assert torch.equal(condition["pooled"], expected[2])
        assert not teacher.encode_prompts([""])["prompt_embeds"].any()  # by SDXL's own rule
    else:
        assert torch.equal(teacher.encode_prompts([""])["prompt_embeds"], null)
    plain = load_teacher(str(folders[family]))
    assert plain.fingerprint(with_network=False) != teacher.fingerprint(with_network=False)
    config = DataConfig(sources=("teacher",))
    assert len({cache_of("teacher", config, each, 0) for each in (plain, teacher)}) == 2
