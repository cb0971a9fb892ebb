"""Small random models of every family, built from their real classes."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import transformers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support.teachers import build_teacher, write_tokenizer

TRANSFORMERS_5 = int(version("transformers").partition(".")[0]) >= 5

# diffusers annotates its tuples with one element only.
UNet: Any = diffusers.UNet2DConditionModel

AutoencoderKL: Any = diffusers.AutoencoderKL

SD: Any = diffusers.StableDiffusionPipeline

SDXL: Any = diffusers.StableDiffusionXLPipeline

DDIMScheduler: Any = diffusers.DDIMScheduler

SD3: Any = diffusers.StableDiffusion3Pipeline

SD3Transformer: Any = diffusers.SD3Transformer2DModel

SanaTransformer: Any = diffusers.SanaTransformer2DModel

FluxTransformer: Any = diffusers.FluxTransformer2DModel

PixArt: Any = diffusers.PixArtTransformer2DModel

PixArtPipeline: Any = diffusers.PixArtAlphaPipeline


def text_config(layers: int = 2, width: int = 16, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=190,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
        **more,
    )


def small_vae(latent_channels: int = 4, **more: Any) -> Any:
    """Three levels and two layers a block, so that the counting from both ends shows."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 24),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        **more,
    )


def build_sd2(folder: Path) -> Path:
    """v-prediction, zero-terminal SNR, linear projections, an OpenCLIP-like text encoder."""
    unet = UNet(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    )
    write_tokenizer(folder.parent / "tokenizer")
    SD(
        vae=small_vae(),
        text_encoder=CLIPTextModel(text_config(layers=3, hidden_act="gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build_sdxl(folder: Path) -> Path:
    """No attention at the top level, one and two transformer blocks below, two text encoders, added embeddings."""
    unet = UNet(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        norm_num_groups=8,
    )
    write_tokenizer(folder.parent / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", model_max_length=77)
    SDXL(
        vae=small_vae(),
        text_encoder=CLIPTextModel(text_config(3)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(3, 24, hidden_act="gelu", projection_dim=20)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def build_ssd1b(folder: Path) -> Path:
    """SDXL with fewer blocks, as SSD-1B's config lists them, and nothing in the middle."""
    pipeline = opened(build_sdxl(folder.parent / "whole"))
    own = {key: value for key, value in pipeline.unet.config.items() if key != "_use_default_values"}
    own |= {"transformer_layers_per_block": [1, [2, 2], [4, 4]], "mid_block_type": None}
    unet = UNet.from_config(own | {"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]})
    SDXL(**{**pipeline.components, "unet": unet}, add_watermarker=False).save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {"sd1": build_teacher, "sd2": build_sd2, "sdxl": build_sdxl}


def build_inpainting(folder: Path) -> Path:
    """An SD1 whose U-Net takes 9 channels: latents, mask, masked image."""
    return _with_nine_channels(opened(build_teacher(folder.parent / "plain")), folder, "StableDiffusionInpaintPipeline")


def build_sdxl_inpainting(folder: Path) -> Path:
    """The same of SDXL."""
    return _with_nine_channels(opened(build_sdxl(folder.parent / "plain")), folder, "StableDiffusionXLInpaintPipeline")


def _with_nine_channels(plain: Any, folder: Path, kind: str) -> Path:
    unet = UNet.from_config({**plain.unet.config, "in_channels": 9})
    own = {} if "XL" in kind else {"requires_safety_checker": False}
    getattr(diffusers, kind)(**{**plain.components, "unet": unet}, **own).save_pretrained(folder)
    return folder


def build_pixart(folder: Path) -> Path:
    """Two blocks under a T5, with the sizes among the inputs that the 1024 px model has."""
    transformer = PixArt(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=128,
        caption_channels=16,
    )
    text = small_t5(16)
    PixArtPipeline(
        tokenizer=letter_tokenizer(120),
        text_encoder=text,
        vae=small_vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
    ).save_pretrained(folder)
    return folder


def small_t5(width: int) -> Any:
    return T5EncoderModel(T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def letter_tokenizer(limit: int) -> Any:
    """A T5 tokenizer of letters."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz")]
    options: dict[str, Any] = {"extra_ids": 0, "model_max_length": limit}
    if TRANSFORMERS_5:
        return T5Tokenizer(vocab=letters, **options)
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(letters, unk_id=2))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=fast, **options)  # pyright: ignore[reportAttributeAccessIssue]


def build_sd3(folder: Path, *, has_t5: bool = True, **changes: Any) -> Path:
    """Three blocks, one of them with a second attention and the last without a way back to the text, as in 3.5 medium."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16 + 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    transformer = SD3Transformer(**{**config, **changes})
    write_tokenizer(folder.parent / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModelWithProjection(text_config(3, projection_dim=16))
    nn.init.eye_(text_encoder.text_projection.weight)  # as published, and as diffusers reads single files
    SD3(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(text_config(3, 24, hidden_act="gelu", projection_dim=20)),
        text_encoder_3=small_t5(40) if has_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=letter_tokenizer(512) if has_t5 else None,
    ).save_pretrained(folder)
    return folder


def build_sana(folder: Path) -> Path:
    """Two blocks under a Gemma 2, an autoencoder with linear attention at its last level, and the published scheduler."""
    transformer = SanaTransformer(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
        timestep_scale=0.5,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),  # pyright: ignore[reportArgumentType]
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),  # pyright: ignore[reportArgumentType]
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.4,
    )
    text = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=512,
        )
    )
    diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=text,  # pyright: ignore[reportArgumentType]
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)
    return folder


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer of letters, which puts <bos> before a prompt."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz"]
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", fuse_unk=True)
    )
    fast.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    fast.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return transformers.GemmaTokenizerFast(tokenizer_object=fast, model_max_length=4096, **special)  # pyright: ignore[reportAttributeAccessIssue]


def build_flux(folder: Path, *, guidance_embeds: bool = True) -> Path:
    """Two blocks of two streams and two of one stream, a shift by image size, 16 latent channels as published."""
    transformer = FluxTransformer(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    write_tokenizer(folder.parent / "tokenizer")
    diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(16, scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=small_t5(24),
        tokenizer=CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", model_max_length=77),
        tokenizer_2=letter_tokenizer(512),
    ).save_pretrained(folder)
    return folder


# Of each family; those of BUILDERS are the layouts that single files have.
FAMILY_BUILDERS = BUILDERS | {
    "inpainting": build_inpainting,
    "sdxl-inpainting": build_sdxl_inpainting,
    "ssd1b": build_ssd1b,
    "sd3": build_sd3,
    "sana": build_sana,
    "flux": build_flux,
    "pixart": build_pixart,
}


def opened(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def models_of(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
