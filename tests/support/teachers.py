"""Helpers that several tests share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edited(folder: Path, to: Path, file: str, edit: Callable[[Any], Any]) -> Path:
    """A copy of a teacher's folder with one JSON file changed."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    return to


# Runs `lcmdistill ARGUMENTS`: return the exit code, standard output and standard error.
Command = Callable[..., tuple[int, str, str]]

# A run small enough to be repeated dozens of times.
SMALL: dict[str, Any] = {
    "data.resolution": 16,
    "optim.batch_size": 4,
    "optim.gradient_accumulation_steps": 1,
    "optim.learning_rate": 1e-3,
    "optim.max_train_steps": 4,
    "objective.w_min": 1.0,
    "objective.w_max": 5.0,
    "run.log_every": 1,
    "run.checkpoint_every": 2,
    "run.validate_every": 0,
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level CLIP tokenizer without merges: every letter is a token."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def fill(module: Any, seed: int) -> None:
    """Random weights that depend on the seed and their names alone, so that golden values outlive a library's release."""
    import torch

    from lcmdistill.diffusion.random import derive_seed

    for name, parameter in module.named_parameters():
        draws = torch.randn(
            parameter.shape,
            generator=torch.Generator().manual_seed(derive_seed(seed, name.removeprefix("text_model."))),
        )
        is_gain = parameter.dim() == 1 and name.endswith("weight")
        scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data.copy_(is_gain + scale * draws)


def build_teacher(folder: Path, prediction_type: str = "epsilon", seed: int = 0, **unet_options: Any) -> Path:
    """A random SD-shaped pipeline of about 0.1M parameters at 16 px, saved as a diffusers folder."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    library: Any = diffusers  # whose annotations are narrower than what it takes
    unet_config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    unet = library.UNet2DConditionModel(**{**unet_config, **unet_options})
    vae = library.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.5,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    )
    for part in (unet, vae, text):
        fill(part, seed)
    write_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / f"{folder.name}-tokenizer", model_max_length=77)
    scheduler = library.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    pipeline = library.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
