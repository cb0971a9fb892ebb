"""Write the trained parts as a standard Stable Diffusion pipeline folder in fp16."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer


def write_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Save copies of all parts, cast to half precision, as ``StableDiffusionPipeline`` does."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(text),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet),
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    _prefix_text_keys(folder / "text_encoder" / "model.safetensors")
    _write_classic_tokenizer(folder / "tokenizer")
    for config in folder.glob("*/config.json"):
        _edit(config, _name_or_path=None)
    # transformers loads in this dtype by default; diffusers loads the other parts in single precision.
    _edit(folder / "text_encoder" / "config.json", dtype="float32")
    for path in folder.glob("*/*.safetensors"):
        path.chmod(0o644)


def _prefix_text_keys(path: Path) -> None:
    """Name the weights ``text_model.*`` as every published checkpoint does; older transformers need that."""
    weights = load_file(path)
    renamed = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def _write_classic_tokenizer(folder: Path) -> None:
    """Add vocab.json, merges.txt, and the special tokens next to tokenizer.json, for older transformers."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _edit(path: Path, **changes: str | None) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    merged = {key: value for key, value in content.items() if key not in changes or value is not None}
    path.write_text(json.dumps(merged, indent=2) + "\n")
