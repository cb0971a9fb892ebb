"""Files that hold parts of a model, scaled fp8, or fewer blocks than their base: the right weights, or one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from lcmdistill.export.single_file import write_single_file
from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.teachers.single_file import load as single_file
from lcmdistill.teachers.single_file.inspect import UnetKeys, inspect_checkpoint, read_header
from lcmdistill.teachers.single_file.load import CONFIGS, load_single_file
from lcmdistill.teachers.single_file.sd_keys import original_unet
from lcmdistill.teachers.single_file.unet_blocks import with_counted_blocks
from lcmdistill.utils.errors import UsageError
from tests.support.models import BUILDERS, UNet, build_ssd1b, models_of, opened
from tests.support.overrides import same_part, same_weights
from tests.support.teachers import build_teacher

UNET, FP8 = "model.diffusion_model.", torch.float8_e4m3fn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> folder of a small random model, in a folder that can stand in for the bundled configs."""
    root = tmp_path_factory.mktemp("configs")
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        built = {name: build(tmp_path_factory.mktemp(name) / name) for name, build in BUILDERS.items()}
    return {name: folder.rename(root / name) for name, folder in built.items()}


@pytest.fixture
def files(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """layout -> checkpoint of a small random model. The bundled configs are those of the small models."""
    monkeypatch.setattr(single_file, "CONFIGS", folders["sd1"].parent)
    paths = {name: tmp_path / f"{name}.safetensors" for name in folders}
    for name, path in paths.items():
        write_single_file(opened(folders[name]), path, dtype=torch.float32)
    return paths


def without(path: Path, *prefixes: str) -> Path:
    """A copy of a checkpoint without the tensors below some prefixes."""
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith(prefixes)}
    save_file(tensors, path.with_name("part.safetensors"))
    return path.with_name("part.safetensors")


def scaled_fp8(
    tensors: dict[str, Tensor], scale: str, marker: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices of a U-Net as ComfyUI's scaled fp8 stores them, and the weights that they stand for."""
    stored, meant = dict(marker), {}
    for key, value in tensors.items():
        meant[key] = value
        stored[key] = value
        if key.startswith(UNET) and value.ndim == 2 and key.endswith(".weight"):
            factor = value.abs().max() / 400
            stored[key] = (value / factor).to(FP8)
            stored[f"{key.removesuffix('.weight')}{scale}"] = factor
            meant[key] = stored[key].float() * factor
    return stored, meant


@pytest.mark.parametrize(
    ("scale", "marker"),
    [
        (".scale_weight", {f"{UNET}scaled_fp8": torch.empty(2, dtype=FP8)}),
        (".weight_scale", {}),
    ],
)
def test_scaled_fp8_weights_are_scaled(scale: str, marker: dict[str, Tensor], files: dict[str, Path]) -> None:
    stored, meant = scaled_fp8(load(files["sd1"].read_bytes()), scale, marker)  # not mapped: the file is overwritten
    save_file(meant, files["sd1"])
    expected = load_single_file(files["sd1"])
    # In another file: older versions of safetensors map a file's weights, and would see the new ones.
    path = files["sd1"].with_name("stored.safetensors")
    save_file(stored, path)
    assert same_weights(load_single_file(path).unet, expected.unet)


def test_a_scale_that_is_missing_is_refused(files: dict[str, Path]) -> None:
    marker = {f"{UNET}scaled_fp8": torch.empty(2, dtype=FP8)}
    stored, _ = scaled_fp8(load(files["sd1"].read_bytes()), ".scale_weight", marker)
    scales = [key for key in stored if key.endswith(".scale_weight")]
    path = files["sd1"].with_name("stored.safetensors")
    for lost in (scales[:1], scales):
        save_file({key: value for key, value in stored.items() if key not in lost}, path)
        with pytest.raises(
            UsageError, match=rf"lacks {UNET}.*\.scale_weight, in total {len(lost)} of the {len(scales)} scales"
        ):
            load_single_file(path)


def test_weights_of_other_quantizations_are_refused(files: dict[str, Path]) -> None:
    tensors = load_file(files["sd1"])
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    save_file({**tensors, key: tensors[key].to(torch.uint8)}, files["sd1"])
    with pytest.raises(
        UsageError, match=r"to_q.weight is quantized \(U8\), which is not supported; use a checkpoint in fp32"
    ):
        load_single_file(files["sd1"])


@pytest.mark.parametrize("layout", list(BUILDERS))
def test_a_checkpoint_without_a_vae_takes_another(
    layout: str, files: dict[str, Path], folders: dict[str, Path]
) -> None:
    path, whole = without(files[layout], "first_stage_model."), opened(folders[layout])
    with pytest.raises(UsageError, match="holds no vae; pass --vae, or --base MODEL"):
        load_pipeline(str(path))
    loaded = load_pipeline(str(path), vae=str(folders[layout]))
    for name, module in models_of(whole).items():
        assert same_weights(models_of(loaded)[name], module), name


def test_a_checkpoint_without_text_encoders_takes_others(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    path, whole = without(files["sdxl"], "conditioner."), opened(folders["sdxl"])
    with pytest.raises(
        UsageError, match="holds no text_encoder and no text_encoder_2; pass --text-encoder, or --base MODEL"
    ):
        load_pipeline(str(path))
    tensors = load_file(files["sdxl"])
    parts = {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."}
    for name, prefix in parts.items():
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        save_file(part, tmp_path / f"{name}.safetensors")
    both = [str(tmp_path / f"{name}.safetensors") for name in parts]
    encoders = [str(folders["sdxl"] / name) for name in ("text_encoder", "text_encoder_2")]
    for words in (both, encoders, [str(folders["sdxl"])]):
        loaded = load_pipeline(str(path), text_encoder=words)
        assert same_weights(loaded.text_encoder, whole.text_encoder)
        assert same_weights(loaded.text_encoder_2, whole.text_encoder_2)
    with pytest.raises(
        UsageError, match=r"1 were passed, and a StableDiffusionXLPipeline has 2 .text_encoder,text_encoder_2"
    ):
        load_pipeline(str(path), text_encoder=both[:1])


def test_another_text_encoder_replaces_a_teacher_s_own(small_teacher: Path, tmp_path: Path) -> None:
    other = build_teacher(tmp_path / "other", seed=7)
    loaded = load_pipeline(str(small_teacher), text_encoder=[str(other)])
    assert same_weights(loaded.text_encoder, opened(other).text_encoder)
    assert same_weights(loaded.unet, opened(small_teacher).unet)
    save_file({"a": torch.zeros(1)}, tmp_path / "rubbish.safetensors")
    text = load_file(other / "text_encoder" / "model.safetensors")
    lost = next(key for key in text if "final_layer_norm" in key)
    save_file({key: value for key, value in text.items() if key != lost}, tmp_path / "half.safetensors")
    for word, message in {
        "absent": "does not exist; use a diffusers folder",
        "rubbish.safetensors": "holds no CLIP text encoder",
        "half.safetensors": "lacks text_model.final_layer_norm",
        "other/unet": "cannot be read as a CLIPTextModel",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_pipeline(str(small_teacher), text_encoder=[str(tmp_path / word)])


def prefixed(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(UNET)}


def bare(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(UNET): value for key, value in prefixed(folder, tensors).items()}


def diffusers(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("keys", [prefixed, bare, diffusers])
@pytest.mark.parametrize("layout", list(BUILDERS))
def test_a_file_of_a_unet_takes_the_rest_from_its_base(
    layout: str, keys: Callable[..., Any], files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, path = opened(folders[layout]), tmp_path / "unet.safetensors"
    save_file(keys(folders[layout], load_file(files[layout])), path)
    with pytest.raises(
        UsageError, match=r"holds no text_encoder.* and no vae; pass --text-encoder and --vae, or --base MODEL"
    ):
        load_pipeline(str(path))
    base = opened(folders[layout])
    for parameter in base.unet.parameters():
        torch.nn.init.zeros_(parameter)
    base.save_pretrained(tmp_path / "base")
    loaded = load_pipeline(str(path), base=str(tmp_path / "base"))
    for name, module in models_of(whole).items():
        assert same_weights(models_of(loaded)[name], module), name
    assert loaded.scheduler.config.prediction_type == whole.scheduler.config.prediction_type
    assert loaded.scheduler.config.rescale_betas_zero_snr == whole.scheduler.config.rescale_betas_zero_snr


def test_the_vae_of_a_file_has_the_scale_of_files_on_any_base(files: dict[str, Path], folders: dict[str, Path]) -> None:
    path = without(files["sd1"], "cond_stage_model.")
    loaded, whole = load_pipeline(str(path), base=str(folders["sd1"])), opened(folders["sd1"])
    assert (loaded.vae.config.scaling_factor, whole.vae.config.scaling_factor) == (0.18215, 0.5)
    assert same_part(loaded.vae, whole.vae)


def test_a_base_that_does_not_fit_or_is_not_needed_is_refused(files: dict[str, Path], folders: dict[str, Path]) -> None:
    sd1 = str(folders["sd1"])
    with pytest.raises(UsageError, match="holds all parts of a pipeline, so --base has no effect"):
        load_pipeline(str(files["sd1"]), base=sd1)
    with pytest.raises(UsageError, match="--base is for single files that lack parts"):
        load_pipeline(sd1, base=sd1)
    with pytest.raises(
        UsageError, match="is Stable Diffusion XL and --base is Stable Diffusion 1; use a base of the same kind"
    ):
        load_pipeline(str(without(files["sdxl"], "conditioner.")), base=sd1)


def test_a_missing_weight_is_named_first(files: dict[str, Path]) -> None:
    tensors = load_file(files["sdxl"])
    lost = f"{UNET}middle_block.1.norm.weight"
    save_file({key: value for key, value in tensors.items() if key != lost}, files["sdxl"])
    with pytest.raises(UsageError) as caught:
        load_single_file(files["sdxl"])
    assert f"lacks {lost}, in total 1 of the " in str(caught.value)


def test_a_unet_without_its_first_weight_is_named_as_such(files: dict[str, Path]) -> None:
    path = without(files["sd1"], f"{UNET}input_blocks.0.0.")
    with pytest.raises(
        UsageError, match=r"lacks model.diffusion_model.input_blocks.0.0.weight, the first weight of its"
    ):
        load_single_file(path)


def test_weights_that_a_unet_has_no_place_for_are_refused(files: dict[str, Path]) -> None:
    save_file({**load_file(files["sd1"]), f"{UNET}time_embed.cond_proj.weight": torch.ones(4, 4)}, files["sd1"])
    with pytest.raises(UsageError, match=r"holds 1 more weights in its U-Net .*, such as .*cond_proj"):
        load_single_file(files["sd1"])


def build_vega(folder: Path) -> Path:
    """SDXL in Segmind Vega's shape: fewer transformer blocks, and one residual block in the middle."""
    pipeline = opened(BUILDERS["sdxl"](folder.parent / "base-of-vega"))
    config = {key: value for key, value in pipeline.unet.config.items() if key != "_use_default_values"}
    config |= {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 3]}
    config |= {"reverse_transformer_layers_per_block": [3, 1, 1]}
    pipeline.register_modules(unet=UNet.from_config(config))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("build", [build_ssd1b, build_vega])
def test_smaller_variants_of_sdxl_are_teachers(
    build: Callable[[Path], Path], files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    whole = opened(build(tmp_path / "model"))
    write_single_file(opened(tmp_path / "model"), files["sdxl"], dtype=torch.float32)
    loaded = load_pipeline(str(files["sdxl"]))
    for name, module in models_of(whole).items():
        assert same_part(models_of(loaded)[name], module), name
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 40)
    added = {"text_embeds": torch.randn(1, 20), "time_ids": torch.randn(1, 6)}
    with torch.no_grad():
        outputs = [p.unet(*inputs, added_cond_kwargs=added).sample for p in (whole, loaded)]
    assert torch.equal(*outputs)
    alone = tmp_path / "unet.safetensors"
    save_file(diffusers(tmp_path / "model", {}), alone)
    assert same_weights(load_pipeline(str(alone), base=str(folders["sdxl"])).unet, whole.unet)


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "SSD-1B": (
        {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        1_331_334_404,
    ),
    "Segmind Vega": (
        {
            "transformer_layers_per_block": [1, 1, 2],
            "reverse_transformer_layers_per_block": [2, 1, 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        745_225_604,
    ),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_published_variants_are_counted_from_their_keys(name: str) -> None:
    changes, parameters = VARIANTS[name]
    config = json.loads((CONFIGS / "sdxl" / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet.from_config({**config, **changes})
        state = unet.state_dict()
        original = with_counted_blocks(config, original_unet(state, unet.config), UnetKeys(UNET, False))
        assert with_counted_blocks(config, state, UnetKeys("", True)) == original
        counted = UNet.from_config(original)
    assert sum(parameter.numel() for parameter in counted.parameters()) == parameters
    assert {k: v.shape for k, v in counted.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_the_parts_of_a_file_are_described(files: dict[str, Path]) -> None:
    path = without(files["sd2"], "cond_stage_model.", "first_stage_model.")
    info = inspect_checkpoint(path, read_header(path))
    assert (info.parts, info.missing, info.layout.key) == (("unet",), ("text_encoder", "vae"), "sd2")
    assert info.prediction_type == "v_prediction"
    assert info.why.startswith("Stable Diffusion 2 (no text encoder, no VAE, cross-attention 16 wide")
