"""The keys of the original Stable Diffusion checkpoints, derived from the configs of diffusers' modules.

Dict of tensors in, dict of tensors out. A table of `places` maps diffusers modules to modules of the original layout. A key
takes the place of its innermost module and keeps the rest of its name. This also works on the meta device.

The names are those of CompVis' latent-diffusion (U-Net, VAE), OpenAI's CLIP as in transformers, and OpenCLIP.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lcmdistill.utils.errors import RunError, UsageError

ATTENTION = {name: name for name in ("norm", "proj_in", "transformer_blocks", "proj_out")}

EMBEDDING = {"linear_1": "0", "linear_2": "2"}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

SD2_LAYERS_READ = 23
"number of text encoder layers that are used, of the 24 in SD2's original file; diffusers' folders contain only these"


def original_unet(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the weights of a UNet2DConditionModel under `model.diffusion_model.`. config: of the same network."""
    return _placed(state, unet_places(config), "model.diffusion_model.")


def original_vae(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the weights of an AutoencoderKL under `first_stage_model.`. config: of the same VAE."""
    tensors = _placed(state, vae_places(config), "first_stage_model.")
    # The original attention consists of 1x1 convolutions, that of diffusers of linear layers.
    return {
        key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
        for key, value in tensors.items()
    }


def original_clip(state: Mapping[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """Return the weights of a CLIPTextModel as in SD1 and in SDXL's first encoder.

    Args:
        state: The weights. Some versions of transformers omit `text_model.` from their keys; the result has it.
        config: The encoder's config.
        prefix: The prefix of the keys, up to and including `transformer.`.
    """
    flat = _without_wrapper(state)
    tensors = _placed(
        flat, {name: name for name in ("embeddings", "encoder", "final_layer_norm")}, f"{prefix}text_model."
    )
    positions = flat["embeddings.position_embedding.weight"]
    # A buffer of the original file. sd-scripts rejects a file without it, and newer transformers do not save it.
    ids = torch.arange(positions.shape[0], device=positions.device)[None]
    return {**tensors, f"{prefix}text_model.embeddings.position_ids": ids}


def original_clip_projection(state: Mapping[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """Return the weights of a CLIPTextModelWithProjection under transformers' names, as in SD3."""
    flat = dict(state)
    projection = flat.pop("text_projection.weight")
    return original_clip(flat, config, prefix) | {f"{prefix}text_projection.weight": projection}


def original_t5(state: Mapping[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """Return the weights of a T5EncoderModel under transformers' names.

    Its one table of embeddings is there under both of its names: ComfyUI reads the one, and diffusers needs the other.
    """
    tensors = {f"{prefix}{key}": value for key, value in state.items()}
    return tensors | {f"{prefix}encoder.embed_tokens.weight": state["shared.weight"].clone()}


def original_openclip(state: Mapping[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """Return the weights of a CLIP text model under OpenCLIP's names, as in SDXL's second encoder.

    Args:
        state: The weights.
        config: The encoder's config.
        prefix: The prefix of the keys, up to and including `model.`.
    """
    fused = _fused_attention(_without_wrapper(state))
    tensors = _placed(fused, openclip_places(config.num_hidden_layers), prefix)
    projection = f"{prefix}text_projection"
    if projection in tensors:  # x @ P there, a Linear here
        tensors[projection] = tensors[projection].T
    return tensors


def original_sd2_text(state: Mapping[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """Return the weights of SD2's text encoder, with the unused last layer and projection of the original file.

    Programs use the output of the second to last layer, and diffusers drops the last one. It is written as a layer of zeros,
    which passes its input on unchanged through its residual connections.

    Args:
        state: The weights.
        config: The encoder's config.
        prefix: The prefix of the keys, up to and including `model.`.

    Raises:
        UsageError: The encoder has more than 23 layers.
    """
    layers = config.num_hidden_layers
    if layers > SD2_LAYERS_READ:
        raise UsageError(
            f"the text encoder has {layers} layers, but programs read only the first {SD2_LAYERS_READ} of an SD2 file"
        )
    tensors = original_openclip(state, config, prefix)
    if layers == SD2_LAYERS_READ:
        last, next_one = (f"{prefix}transformer.resblocks.{n}." for n in (layers - 1, layers))
        tensors |= {
            key.replace(last, next_one): torch.zeros_like(value)
            for key, value in tensors.items()
            if key.startswith(last)
        }
    token = tensors[f"{prefix}token_embedding.weight"]
    tensors.setdefault(f"{prefix}text_projection", torch.eye(token.shape[1], dtype=token.dtype, device=token.device))
    return tensors


TEXT_STYLES: dict[str, Callable[[Mapping[str, Tensor], Any, str], dict[str, Tensor]]] = {
    "clip": original_clip,
    "clip-projection": original_clip_projection,
    "t5": original_t5,
    "openclip": original_openclip,
    "openclip-penultimate": original_sd2_text,
}
"""the key styles of SingleFileLayout.text_encoders: (weights, config, key prefix) -> tensors under their original keys"""


def unet_places(config: Any) -> dict[str, str]:
    """Return the place of each diffusers module, from the block types and the layers per block."""
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= _inside("time_embedding", "time_embed", EMBEDDING) | _inside("add_embedding", "label_emb.0", EMBEDDING)
    places |= _inside("mid_block.resnets.0", "middle_block.0", RESNET)
    places |= _inside("mid_block.attentions.0", "middle_block.1", ATTENTION)
    places |= _inside("mid_block.resnets.1", "middle_block.2", RESNET)
    return places | _unet_down_places(config) | _unet_up_places(config)


def _unet_down_places(config: Any) -> dict[str, str]:
    """Return the places of the input blocks, which are numbered consecutively: one per layer, one per downsampler."""
    places, number, kinds = {}, 0, config.down_block_types
    for i, layers in enumerate(_layers(config)):
        for j in range(layers):
            number += 1
            places |= _inside(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0", RESNET)
            if kinds[i] == "CrossAttnDownBlock2D":
                places |= _inside(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1", ATTENTION)
        if i < len(kinds) - 1:
            number += 1
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    return places


def _unet_up_places(config: Any) -> dict[str, str]:
    """Return the places of the output blocks: one number per layer; an upsampler is the last part of its block's last layer."""
    places, number, kinds = {}, 0, config.up_block_types
    for i, layers in enumerate(reversed(_layers(config))):
        attends = kinds[i] == "CrossAttnUpBlock2D"
        for j in range(layers + 1):
            places |= _inside(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0", RESNET)
            if attends:
                places |= _inside(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1", ATTENTION)
            number += 1
        if i < len(kinds) - 1:
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + attends}.conv"
    return places


def vae_places(config: Any) -> dict[str, str]:
    """Return the place of each diffusers module. The original counts the decoder's blocks from the image inwards."""
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        places |= _inside(half, half, {"conv_in": "conv_in", "conv_out": "conv_out", "conv_norm_out": "norm_out"})
        places |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        for j in (0, 1):
            places |= _inside(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", VAE_RESNET)
    for i in range(len(config.down_block_types)):
        places[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        for j in range(config.layers_per_block):
            places |= _inside(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_RESNET)
    for i in range(len(config.up_block_types)):
        level = len(config.up_block_types) - 1 - i
        places[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
        for j in range(config.layers_per_block + 1):
            places |= _inside(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{level}.block.{j}", VAE_RESNET)
    return places


def openclip_places(layers: int) -> dict[str, str]:
    """Return the OpenCLIP place of each CLIP text module. Two originals are bare tensors, hence the whole keys."""
    places = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    }
    for i in range(layers):
        places |= _inside(f"encoder.layers.{i}", f"transformer.resblocks.{i}", OPENCLIP_LAYER)
    return places


def _inside(module: str, original: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{part}": f"{original}.{place}" for part, place in parts.items()}


def _layers(config: Any) -> list[int]:
    """Return the number of layers of each down block."""
    layers = config.layers_per_block
    return [layers] * len(config.down_block_types) if isinstance(layers, int) else list(layers)


def _placed(state: Mapping[str, Tensor], places: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """Return every tensor under its original key.

    Raises:
        RunError: A key has no place, or two keys share one.
    """
    keys = {key: original_key(key, places) for key in state}
    missing = sorted(key for key, original in keys.items() if original is None)
    if missing:
        raise RunError(
            f"{len(missing)} of {len(keys)} weights have no place in the original layout ({prefix}...), among them {missing[0]}"
        )
    tensors = {f"{prefix}{keys[key]}": value for key, value in state.items()}
    if len(tensors) < len(keys):
        raise RunError(f"{len(keys) - len(tensors)} weights would share a key in the original layout ({prefix}...)")
    return tensors


def original_key(key: str, places: Mapping[str, str]) -> str | None:
    """Return the original key of a diffusers key; None if its module has no place."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        place = places.get(".".join(parts[:n]))
        if place is not None:
            return ".".join([place, *parts[n:]])
    return None


def _without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the keys without `text_model.`, which depends on the class and on the version of transformers."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def _fused_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge query, key and value of every layer into the `in_proj` of torch's MultiheadAttention, in this order."""
    projections = {key for key in state if key.split(".")[-2] in ("q_proj", "k_proj", "v_proj")}
    fused = {key: value for key, value in state.items() if key not in projections}
    for key in projections:
        module, _, kind = key.rsplit(".", 2)
        fused[f"{module}.in_proj_{kind}"] = torch.cat([state[f"{module}.{name}_proj.{kind}"] for name in "qkv"])
    return fused
