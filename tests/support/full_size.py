"""Stable Diffusion 1.5's real shapes with random fp16 weights: `python full_size.py FOLDER` writes a diffusers folder."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.support.teachers import fill, write_tokenizer

library: Any = diffusers  # whose annotations are narrower than what it takes

UNET = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}

PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def build_sd15(folder: Path) -> None:
    """A StableDiffusionPipeline of 1.07 billion parameters; its tokenizer knows letters only."""
    with torch.device("meta"):
        parts = {
            "unet": library.UNet2DConditionModel(**UNET, sample_size=64),
            "vae": library.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=512,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    bos_token_id=188,
                    eos_token_id=189,
                    pad_token_id=189,
                )
            ),
        }
    for name, part in parts.items():
        assert sum(p.numel() for p in part.parameters()) == PARAMETERS[name], name
        part.half().to_empty(device="cpu")
        fill(part, seed=0)
        for _, positions in part.named_buffers():  # the one buffer of all, CLIP's position_ids
            positions.copy_(torch.arange(positions.shape[-1]))
    write_tokenizer(folder.parent / "tokenizer")
    library.StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", model_max_length=77),
        scheduler=library.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


if __name__ == "__main__":
    build_sd15(Path(sys.argv[1]))
