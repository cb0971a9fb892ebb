"""A pipeline as one checkpoint file of the kind that A1111 and ComfyUI open, and the proof that it reads back the same."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.consistency import omega_embedding
from lcmdistill.errors import RunError, UsageError
from lcmdistill.export.omega import bake_omega
from lcmdistill.export.original_layout import (
    original_clip,
    original_openclip,
    original_sd2_text,
    original_unet,
    original_vae,
)
from lcmdistill.export.pipeline import STEPS

ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""of the largest difference that verify_single_file lets pass, as a part of the reference's largest magnitude; half
precisions round the weights (small models are off by up to .002 and .02), a weight in the wrong place is off by about 1"""


def layout_of(pipeline: Any) -> str:
    """Which original layout a diffusers pipeline has, sd1, sd2 or sdxl; told apart as the programs do it.

    Raises UsageError on a pipeline without a first text encoder (SDXL's refiner).
    """
    if getattr(pipeline, "text_encoder", None) is None:
        raise UsageError("a pipeline without its first text encoder cannot be written as a single file")
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return "sdxl"
    return "sd2" if pipeline.unet.config.use_linear_projection else "sd1"


def original_tensors(pipeline: Any, unet: Any) -> dict[str, Tensor]:
    """All weights under the original keys; unet: takes the pipeline's place and has no omega input.

    Raises RunError on a weight that has no place in the layout.
    """
    text = pipeline.text_encoder.state_dict()
    layout = layout_of(pipeline)
    tensors = original_unet(unet.state_dict(), unet.config)
    tensors |= original_vae(pipeline.vae.state_dict(), pipeline.vae.config)
    if layout == "sd1":
        return tensors | original_clip(text, "cond_stage_model.transformer.")
    if layout == "sd2":
        return tensors | original_sd2_text(text, pipeline.text_encoder.config)
    second = pipeline.text_encoder_2
    tensors |= original_clip(text, "conditioner.embedders.0.transformer.")
    return tensors | original_openclip(second.state_dict(), second.config, "conditioner.embedders.1.model.")


def write_single_file(
    pipeline: Any,
    path: Path,
    *,
    dtype: torch.dtype,
    guidance_scale: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `path` (.safetensors), whole or not at all.

    guidance_scale: diffusers' convention, omega + 1; baked into a U-Net with an omega input, which needs it, and not
    allowed otherwise. metadata: header strings, which win over the ones made here. Raises UsageError on what cannot be
    written, RunError on a weight that has no place in the layout or is not finite in `dtype`.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"a single file is read by its ending; name it {path.stem}.safetensors instead of {path.name}")
    header = {**header_of(pipeline, guidance_scale), "modelspec.title": path.stem, **(metadata or {})}
    tensors = original_tensors(pipeline, unet_for_file(pipeline.unet, guidance_scale))
    tensors = {key: _cast(key, value, dtype) for key, value in tensors.items()} | _markers(pipeline.scheduler.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, aside, metadata=header)
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def unet_for_file(unet: Any, guidance_scale: float | None) -> Any:
    """The U-Net as a file holds it: omega baked in. Raises UsageError if it needs a guidance and has none, or the reverse."""
    if guidance_scale is not None:
        return bake_omega(unet, guidance_scale)
    if unet.config.time_cond_proj_dim is not None:
        raise UsageError("single files have no omega input; say which guidance to bake in with --guidance-scale")
    return unet


def header_of(pipeline: Any, guidance_scale: float | None) -> dict[str, str]:
    """The safetensors header: what the file is and how it is to be sampled (ModelSpec 1.0.1).

    Raises UsageError on a prediction type that the programs do not know.
    """
    prediction, unet = pipeline.scheduler.config.get("prediction_type", "epsilon"), pipeline.unet
    architecture = ARCHITECTURES.get((layout_of(pipeline), prediction))
    if architecture is None:
        raise UsageError(f"a single file's readers know epsilon and v-prediction; this model predicts {prediction!r}")
    baked = (
        "" if guidance_scale is None else f"; guidance {guidance_scale:g} (omega {guidance_scale - 1:g}) is built in"
    )
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "sgm",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "modelspec.tags": "lcm, latent-consistency-model",
        "modelspec.usage_hint": f"LCM sampler, {STEPS} steps (2 to 8), CFG scale 1{baked}",
        "lcmdistill.recommended_sampler": "LCM",
        "lcmdistill.recommended_steps": str(STEPS),
        "lcmdistill.recommended_cfg_scale": "1",
        "lcmdistill.vae_scaling_factor": f"{pipeline.vae.config.scaling_factor:g}",
    }
    size = unet.config.sample_size
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        header["modelspec.resolution"] = f"{width * factor}x{height * factor}"
    if guidance_scale is not None:
        header["lcmdistill.guidance_scale"] = f"{guidance_scale:g}"
        header["lcmdistill.omega"] = f"{guidance_scale - 1:g}"
    return header


def _markers(scheduler_config: Any) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and A1111 know v-prediction and zero-terminal SNR; they read no header."""
    if scheduler_config.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if scheduler_config.get("rescale_betas_zero_snr") else ["v_pred"]
    return {name: torch.tensor([]) for name in names}


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, contiguous, floats in dtype. Raises RunError if that makes an infinity."""
    if value.is_floating_point():
        value = value.to("cpu", dtype)
        if not torch.isfinite(value).all():
            raise RunError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}; choose another --dtype")
    return value.cpu().contiguous()


# -- verification ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def verify_single_file(
    path: Path,
    pipeline_folder: Path,
    reference_unet: Any,
    *,
    guidance_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    bound: float | None = None,
) -> float:
    """The largest difference between the file, read by diffusers without a network, and what it was made of.

    A U-Net step, the VAE both ways and the text encodings on fixed inputs, in fp32; relative to each reference's largest
    magnitude. pipeline_folder: the diffusers folder with configs, VAE and text encoders; reference_unet: with its omega
    input if it had one, which is then given guidance_scale; dtype: the file's; bound: BOUNDS[dtype] unless given.
    Raises RunError above the bound.
    """
    bound = BOUNDS[dtype] if bound is None else bound
    loaded = _read_back(path, pipeline_folder)
    differences = {
        "U-Net": _difference(loaded.unet, reference_unet, lambda unet: _unet_step(unet, guidance_scale)),
        "VAE": _difference(loaded.vae, _reference(loaded, pipeline_folder, "vae"), _vae_both_ways),
    }
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(loaded, name, None) is not None:
            differences[name] = _difference(
                getattr(loaded, name), _reference(loaded, pipeline_folder, name), _text_encoding
            )
    for part, difference in differences.items():
        if not difference <= bound:  # a NaN is above any bound
            raise RunError(
                f"{path.name} does not read back as it was: its {part} is off by {difference:.1e} > {bound:g}"
            )
    return max(differences.values())


def _read_back(path: Path, pipeline_folder: Path) -> Any:
    """The pipeline in a single file, through diffusers' own loader and configs of which the network is never asked."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config"
        shutil.copytree(pipeline_folder, config, ignore=_all_but_configs)
        # diffusers cannot read a single file for a U-Net whose config has an omega input; the file's has none.
        values = json.loads((config / "unet" / "config.json").read_text())
        (config / "unet" / "config.json").write_text(json.dumps({**values, "time_cond_proj_dim": None}))
        is_xl = "text_encoder_2" in json.loads((config / "model_index.json").read_text())
        kind = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
        absent: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
        if not is_xl:
            absent |= {"safety_checker": None, "requires_safety_checker": False}
        return kind.from_single_file(str(path), config=str(config), local_files_only=True, **absent)


def _all_but_configs(folder: str, names: list[str]) -> set[str]:
    """What copytree is to leave out."""
    return {
        name
        for name in names
        if not (Path(folder) / name).is_dir() and Path(name).suffix not in (".json", ".txt", ".model")
    }


def _reference(loaded: Any, pipeline_folder: Path, name: str) -> Any:
    """A part of the diffusers folder, in the class that the file's has."""
    return type(getattr(loaded, name)).from_pretrained(pipeline_folder / name, local_files_only=True).float()


def _difference(module: Any, reference: Any, outputs: Callable[[Any], list[Tensor]]) -> float:
    """The largest difference of the outputs of two modules, each relative to the reference's largest magnitude."""
    pairs = zip(outputs(module), outputs(reference), strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs)


def _unet_step(unet: Any, guidance_scale: float | None) -> list[Tensor]:
    config, rng = unet.config, torch.Generator().manual_seed(0)
    size = 2 * 2 ** (len(config.block_out_channels) - 1)
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, config.in_channels, size, size, generator=rng),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim, generator=rng),
        "timestep": torch.tensor([499, 19]),
    }
    added = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added["text_embeds"] = torch.randn(2, pooled, generator=rng)
        added["time_ids"] = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2)
    if config.time_cond_proj_dim is not None and guidance_scale is not None:
        inputs["timestep_cond"] = omega_embedding(torch.full((2,), guidance_scale - 1.0), config.time_cond_proj_dim)
    moved = {key: _like(unet, value) for key, value in inputs.items()}
    added = {key: _like(unet, value) for key, value in added.items()}
    return [unet(**moved, added_cond_kwargs=added, return_dict=False)[0].float().cpu()]


def _vae_both_ways(vae: Any) -> list[Tensor]:
    rng, size = torch.Generator().manual_seed(0), 4 * 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=rng)
    pixels = torch.rand(1, vae.config.in_channels, size, size, generator=rng) * 2 - 1
    decoded = vae.decode(_like(vae, latents), return_dict=False)[0]
    encoded = vae.encode(_like(vae, pixels), return_dict=False)[0].mean
    return [decoded.float().cpu(), encoded.float().cpu()]


def _text_encoding(encoder: Any) -> list[Tensor]:
    config = encoder.config
    shape = (2, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    output = encoder(ids.to(encoder.device))
    return [value.float().cpu() for value in (output.last_hidden_state, output.get("text_embeds")) if value is not None]


def _like(module: Any, value: Tensor) -> Tensor:
    """On the module's device, and floats in its dtype."""
    return value.to(module.device, module.dtype if value.is_floating_point() else None)
