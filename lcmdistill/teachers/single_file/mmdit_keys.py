"""The keys of Stable Diffusion 3's MMDiT in its original checkpoints, derived from the modules of diffusers' transformer.

Query, key and value are one tensor there. The two halves of some modulations, scale and shift, are in the other order. The
table of positions is among the weights.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcmdistill.teachers.single_file.sd_keys import original_key
from lcmdistill.utils.errors import RunError

_MODULES = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}

_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}

_FUSED = {
    **{f"attn.to_{name}": ("x_block.attn.qkv", part) for part, name in enumerate("qkv")},
    **{f"attn.add_{name}_proj": ("context_block.attn.qkv", part) for part, name in enumerate("qkv")},
    **{f"attn2.to_{name}": ("x_block.attn2.qkv", part) for part, name in enumerate("qkv")},
}
"module of a block -> the original module that holds it, and which third of its rows"


class Place(NamedTuple):
    """Where a weight of diffusers' transformer is in the original layout.

    Attributes:
        key: Its key there.
        part: Which third of the tensor it is; None for all of it.
        is_swapped: Whether its halves are in the other order there.
    """

    key: str
    part: int | None = None
    is_swapped: bool = False


def mmdit_place(name: str, num_layers: int) -> Place:
    """Return the place of a weight.

    Args:
        name: Its name in diffusers' transformer.
        num_layers: The number of blocks; the last one normalizes the text like the network's end does.

    Raises:
        RunError: It has none.
    """
    if (match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", name)) is None:
        key = original_key(name, _MODULES)
        if key is None:
            raise RunError(f"{name} has no place in the original layout of Stable Diffusion 3")
        return Place(key, is_swapped=name.startswith("norm_out."))
    number, module, end = int(match[1]), match[2], match[3]
    block = f"joint_blocks.{number}"
    if module in _FUSED:
        fused, part = _FUSED[module]
        return Place(f"{block}.{fused}.{end}", part)
    if module not in _BLOCK:
        raise RunError(f"{name} has no place in the original layout of Stable Diffusion 3")
    is_swapped = module == "norm1_context.linear" and number == num_layers - 1
    return Place(f"{block}.{_BLOCK[module]}.{end}", is_swapped=is_swapped)


def swapped(value: Tensor) -> Tensor:
    """Return a tensor with its two halves in the other order."""
    return torch.cat(value.chunk(2)[::-1])


def original_mmdit(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return the weights of an SD3Transformer2DModel under `model.diffusion_model.`."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        place = mmdit_place(name, num_layers)
        parts.setdefault(place.key, {})[place.part or 0] = swapped(value) if place.is_swapped else value
    return {
        f"model.diffusion_model.{key}": torch.cat([each[i] for i in sorted(each)]) if len(each) > 1 else each[0]
        for key, each in parts.items()
    }


def mmdit_config(tensors: Mapping[str, tuple[str, tuple[int, ...]]], prefix: str) -> dict[str, Any]:
    """Return the config of the transformer in a file, by the names and shapes of its tensors.

    Args:
        tensors: {name: (dtype, shape)}.
        prefix: What precedes the original keys.
    """

    def shape(key: str) -> tuple[int, ...]:
        return tensors[f"{prefix}{key}"][1]

    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("joint_blocks.")}
    width, channels, patch, _ = shape("x_embedder.proj.weight")
    norms = [name for name in names if name.endswith("x_block.attn.ln_q.weight")]
    head = shape(norms[0])[0] if norms else 64
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.weight")[0] // patch**2,
        "num_layers": len(blocks),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "caption_projection_dim": shape("context_embedder.weight")[0],
        "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
        "pos_embed_max_size": math.isqrt(shape("pos_embed")[1]),
        "dual_attention_layers": sorted(i for i in blocks if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in names),
        "qk_norm": "rms_norm" if norms else None,
    }
