"""The original key layouts: every weight once, the real models' key sets, and OpenCLIP's arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcmdistill.export.single_file import original_tensors
from lcmdistill.teachers.single_file.sd_keys import (
    original_clip,
    original_openclip,
    original_sd2_text,
    original_unet,
    original_vae,
)
from tests.support.models import BUILDERS, AutoencoderKL, UNet, models_of, opened, text_config


@pytest.mark.parametrize("layout", list(BUILDERS))
def test_every_weight_is_written_exactly_once(layout: str, tmp_path: Path) -> None:
    pipeline, sizes = opened(BUILDERS[layout](tmp_path / "model")), {}
    for name, model in models_of(pipeline).items():
        for key, value in model.state_dict().items():
            sizes[name, key] = value.numel()
            value.fill_(
                float(len(sizes))
            )  # state_dict shares the model's memory: every tensor gets a number of its own
    found: dict[float, int] = {}
    for key, value in original_tensors(pipeline, pipeline.unet).items():
        if value.is_floating_point() and not key.startswith("cond_stage_model.model.text_projection"):
            numbers, counts = value.unique(return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                assert number not in found, f"{key} holds a weight that was written before"
                found[number] = count
    assert found == {float(i + 1): size for i, size in enumerate(sizes.values())}


SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}

SD21: dict[str, Any] = {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "parameters", "keys", "shapes"),
    [
        (
            SD15,
            859_520_964,
            686,
            {
                "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
                "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
            },
        ),
        (
            {**SD21, "use_linear_projection": True},
            865_910_724,
            686,
            {
                "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
                "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
                "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
                "input_blocks.1.1.proj_in.weight": (320, 320),
            },
        ),
        (
            SDXL,
            2_567_463_684,
            1680,
            {
                "label_emb.0.0.weight": (1280, 2816),
                "middle_block.1.transformer_blocks.9.ff.net.2.bias": (1280,),
                "output_blocks.5.2.conv.bias": (640,),
                "input_blocks.3.0.op.weight": (320, 320, 3, 3),
            },
        ),
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_real_u_nets_have_the_original_keys(
    config: dict[str, Any], parameters: int, keys: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        unet = UNet(**config)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    tensors = original_unet(unet.state_dict(), unet.config)
    assert len(tensors) == keys
    for key, shape in shapes.items():
        assert tuple(tensors[f"model.diffusion_model.{key}"].shape) == shape
    # diffusers' own reading of these keys is the state that went in, each tensor under its own name
    back = convert_ldm_unet_checkpoint(dict(tensors), unet.config)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in unet.state_dict().items()}


def test_the_real_vae_has_the_original_keys() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    tensors = original_vae(vae.state_dict(), vae.config)
    assert len(tensors) == 248
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert tensors["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert tensors["first_stage_model.decoder.up.3.upsample.conv.bias"].shape == (512,)
    back = convert_ldm_vae_checkpoint(dict(tensors), vae.config)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in vae.state_dict().items()}


def real_text(width: int, layers: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        **more,
    )


def test_real_text_encoders_have_the_original_keys() -> None:
    with torch.device("meta"):
        clip_l = CLIPTextModel(real_text(768, 12))
        clip_h = CLIPTextModel(real_text(1024, 23, hidden_act="gelu"))
        clip_g = CLIPTextModelWithProjection(real_text(1280, 32, hidden_act="gelu", projection_dim=1280))
    sd1 = original_clip(clip_l.state_dict(), clip_l.config, "cond_stage_model.transformer.")
    assert len(sd1) == 197
    assert sd1["cond_stage_model.transformer.text_model.embeddings.position_ids"].shape == (1, 77)
    # The original files of SD2 and SDXL have one key more: OpenCLIP's logit_scale, which belongs to no text encoder.
    sd2 = original_sd2_text(clip_h.state_dict(), clip_h.config, "cond_stage_model.model.")
    assert len(sd2) == 24 * 12 + 5
    assert sd2["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    sdxl = original_openclip(clip_g.state_dict(), clip_g.config, "conditioner.embedders.1.model.")
    assert len(sdxl) == 32 * 12 + 5
    assert "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias" in sdxl
    assert sdxl["conditioner.embedders.1.model.text_projection"].shape == (1280, 1280)


def openclip_output(tensors: dict[str, Tensor], heads: int, ids: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """(hidden state after ln_final, projected last token) of a text tower, from torch's own MultiheadAttention."""
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    width = x.shape[-1]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)

    def normed(name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    for n in range(layers):
        block = f"transformer.resblocks.{n}"
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        prefix = f"{block}.attn."
        attention.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        h = normed(f"{block}.ln_1", x)
        x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = linear(f"{block}.mlp.c_fc", normed(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", nn.functional.gelu(h))
    x = normed("ln_final", x)
    return x, x[:, -1] @ tensors["text_projection"]


def fixed_ids() -> Tensor:
    ids = torch.randint(188, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 189
    return ids


@torch.no_grad()
def test_an_openclip_tower_of_these_keys_is_the_text_encoder() -> None:
    encoder = CLIPTextModelWithProjection(text_config(3, 24, hidden_act="gelu", projection_dim=20)).eval()
    prefix = "conditioner.embedders.1.model."
    tensors = original_openclip(encoder.state_dict(), encoder.config, prefix)
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    hidden, projected = openclip_output(tensors, 2, fixed_ids(), layers=3)
    expected = encoder(fixed_ids())
    torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(projected, expected.text_embeds, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sd2_s_unread_layer_hands_its_input_on() -> None:
    encoder = CLIPTextModel(text_config(layers=23, hidden_act="gelu")).eval()
    prefix = "cond_stage_model.model."
    tensors = original_sd2_text(encoder.state_dict(), encoder.config, "cond_stage_model.model.")
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    expected = encoder(fixed_ids()).last_hidden_state
    for layers in (23, 24):  # whether a program stops before the last layer or not
        hidden, _ = openclip_output(tensors, 2, fixed_ids(), layers)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
