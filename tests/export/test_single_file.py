"""Single files: every layout reads back through diffusers' own loader, and has omega baked in."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lcmdistill.diffusion.consistency import omega_embedding
from lcmdistill.export.bake_guidance import bake_omega
from lcmdistill.export.single_file import configs_of, layout_of, original_tensors, read_back, write_single_file
from lcmdistill.export.verify import BOUNDS, check_close, pipeline_outputs
from lcmdistill.students.full import full_student
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.models import BUILDERS, models_of, opened, text_config
from tests.support.overrides import same_part

each_layout = pytest.mark.parametrize("layout", list(BUILDERS))

GUIDANCE = 7.5


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> diffusers folder of a small random model."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        return {name: build(tmp_path_factory.mktemp(name) / "model") for name, build in BUILDERS.items()}


def with_omega(unet: Any) -> Any:
    """The U-Net as a student whose omega input does something."""
    student = full_student(unet, "random", seed=3).eval().requires_grad_(False)
    student.time_embedding.cond_proj.weight.mul_(4.0)
    return student


def difference(
    path: Path, pipeline: Any, *, guidance_scale: float = 1.0, bound: float = BOUNDS[torch.float32]
) -> float:
    """How far a file, read back by diffusers, is from the pipeline that it was made of."""
    with configs_of(pipeline) as configs:
        got = pipeline_outputs(read_back(path, configs), guidance_scale)
    message = check_close(got, pipeline_outputs(pipeline, guidance_scale), bound, path.name)
    return float(message.partition("largest difference ")[2].split()[0])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@each_layout
@pytest.mark.usefixtures("no_network")
def test_the_file_reads_back_weight_for_weight(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline, path = opened(folders[layout]), tmp_path / "model.safetensors"
    write_single_file(pipeline, path, dtype=torch.float32)
    config, absent = str(folders[layout]), {} if layout == "sdxl" else {"safety_checker": None}
    loaded = type(pipeline).from_single_file(str(path), config=config, local_files_only=True, **absent)
    # What diffusers takes from its own configs, and other programs assume.
    loaded.vae.register_to_config(scaling_factor=layout_of(pipeline).latent_scale)
    assert set(models_of(loaded)) == set(models_of(pipeline))
    for name, model in models_of(pipeline).items():
        assert set(models_of(loaded)[name].state_dict()) == set(model.state_dict())
        assert same_part(models_of(loaded)[name], model)
    assert difference(path, pipeline) <= (
        2e-6 if layout == "sdxl" else 1e-6
    )  # the one whose VAE is rescaled, and rounded
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_layout
def test_half_precision_is_really_cast_and_stays_close(
    layout: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline, path = opened(folders[layout]), tmp_path / "half.safetensors"
    write_single_file(pipeline, path, dtype=dtype)
    tensors = load_file(path)
    assert {v.dtype for k, v in tensors.items() if k not in ("v_pred", "ztsnr") and v.is_floating_point()} == {dtype}
    assert difference(path, opened(folders[layout]), bound=BOUNDS[dtype]) > 1e-6


def test_23_layers_read_back_through_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline, path = opened(folders["sd2"]), tmp_path / "deep.safetensors"
    pipeline.text_encoder = CLIPTextModel(text_config(layers=23, hidden_act="gelu")).eval()
    write_single_file(pipeline, path, dtype=torch.float32)
    assert difference(path, pipeline) <= 1e-6
    pipeline.text_encoder = CLIPTextModel(text_config(layers=24)).eval()
    with pytest.raises(UsageError, match="24 layers"):
        write_single_file(pipeline, path, dtype=torch.float32)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0, 14.0])
def test_baked_omega_equals_the_embedded_one(guidance_scale: float, small_teacher: Path) -> None:
    student = with_omega(opened(small_teacher).unet)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    baked = bake_omega(student, guidance_scale)
    assert baked.config.time_cond_proj_dim is None
    rng = torch.Generator().manual_seed(0)
    z, c = torch.randn(3, 4, 8, 8, generator=rng), torch.randn(3, 5, 16, generator=rng)
    t, w = torch.tensor([999, 499, 19]), torch.full((3,), guidance_scale - 1)
    with torch.no_grad():
        embedded = student(z, t, c, timestep_cond=omega_embedding(w)).sample
        torch.testing.assert_close(baked(z, t, c).sample, embedded, atol=1e-5, rtol=0)
        assert (student(z, t, c).sample - embedded).abs().max() > 1e-3  # leaving it out would show
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


@each_layout
@pytest.mark.usefixtures("no_network")
def test_a_student_s_file_has_its_omega_and_says_so(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline, path = opened(folders[layout]), tmp_path / "student.safetensors"
    pipeline.unet = with_omega(pipeline.unet)
    write_single_file(pipeline, path, dtype=torch.float32, guidance_scale=GUIDANCE, metadata={"modelspec.author": "me"})
    assert difference(path, pipeline, guidance_scale=GUIDANCE) <= 1e-5
    with pytest.raises(RunError, match="network differs by"):
        difference(path, pipeline, guidance_scale=1.0)
    with safe_open(path, "pt") as handle:
        header, keys = handle.metadata(), set(handle.keys())
    assert (header["lcmdistill.guidance_scale"], header["lcmdistill.omega"]) == ("7.5", "6.5")
    assert header["modelspec.usage_hint"].startswith(
        "LCM sampler, 4 steps (2 to 8), CFG scale 1; guidance 7.5 (omega 6.5)"
    )
    assert (header["modelspec.author"], header["modelspec.title"]) == ("me", "student")
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    expected = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
    assert header["modelspec.architecture"] == expected[layout]
    assert header["modelspec.resolution"] == {"sd1": "16x16", "sd2": "32x32", "sdxl": "64x64"}[layout]
    assert header["modelspec.prediction_type"] == ("v" if layout == "sd2" else "epsilon")
    assert ({"v_pred", "ztsnr"} <= keys) == (layout == "sd2")


def test_what_cannot_be_written_is_said(small_teacher: Path, tmp_path: Path) -> None:
    pipeline, path = opened(small_teacher), tmp_path / "model.safetensors"

    def write(**more: Any) -> None:
        write_single_file(pipeline, more.pop("path", path), **{"dtype": torch.float32, **more})

    with pytest.raises(UsageError, match=r"use model\.safetensors instead"):
        write(path=tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match="no guidance input"):
        write(guidance_scale=GUIDANCE)
    pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(UsageError, match="this one predicts sample; use --format pipeline"):
        write()
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    plain, pipeline.unet = pipeline.unet, with_omega(pipeline.unet)
    with pytest.raises(UsageError, match="--guidance-scale"):
        write()
    with pytest.raises(RunError, match=r"1 of \d+ weights .* time_embedding.cond_proj.weight"):
        original_tensors(pipeline, pipeline.unet)
    pipeline.unet = plain
    with torch.no_grad():
        plain.conv_in.bias.fill_(1e6)
    with pytest.raises(RunError, match=r"input_blocks\.0\.0\.bias is not finite in float16"):
        write(dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "weight"),
    [
        ("unet", "conv_out.weight"),
        ("vae", "encoder.conv_out.weight"),
        ("vae", "decoder.conv_out.weight"),
        ("text_encoder", "final_layer_norm.weight"),
    ],
)
def test_a_file_that_differs_is_refused(part: str, weight: str, small_teacher: Path, tmp_path: Path) -> None:
    pipeline, path = opened(small_teacher), tmp_path / "model.safetensors"
    with torch.no_grad():
        next(value for key, value in getattr(pipeline, part).named_parameters() if key.endswith(weight)).mul_(1.001)
    write_single_file(pipeline, path, dtype=torch.float32)
    with pytest.raises(RunError, match="does not reproduce the trained model"):
        difference(path, opened(small_teacher))
    assert difference(path, opened(small_teacher), bound=1e-2) > 1e-5


def test_the_folder_of_configs_alone_holds_no_weights(small_teacher: Path, tmp_path: Path) -> None:
    """What is compared comes from the file: there are no other weights for the loader to fall back on."""
    pipeline, path = opened(small_teacher), tmp_path / "model.safetensors"
    write_single_file(pipeline, path, dtype=torch.float32)
    tensors = load_file(path)
    partial = {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}
    save_file(partial, path, metadata={"format": "pt"})
    with pytest.raises(Exception, match="missing in the checkpoint"):
        difference(path, pipeline)
