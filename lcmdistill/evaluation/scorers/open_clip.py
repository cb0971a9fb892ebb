"""Weights of the open_clip library as a CLIPModel of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
"spelled as in transformers, pre_layrnorm included"

TRANSPOSED = ("text_projection", "visual.proj")
"x @ P there, a Linear here"

UNUSED = ("attn_mask",)
"a constant that old versions of the library save"

VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"channels per head of ViT-H, ViT-g and ViT-bigG, by their width; the weights do not show them, and others have 64"


def transformers_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's weights under the names of a CLIPModel. Unknown keys keep their names, and are refused later."""
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in UNUSED:
            continue
        before, found, rest = key.partition("transformer.resblocks.")
        if not found:
            weights[TOP.get(key, key)] = value.T if key in TRANSPOSED else value
            continue
        number, _, place = rest.partition(".")
        layer = f"{'vision' if before else 'text'}_model.encoder.layers.{number}"
        module, _, what = place.rpartition(".")
        if place.startswith("attn.in_proj_"):
            kind = place.removeprefix("attn.in_proj_")
            parts = zip("qkv", value.chunk(3), strict=True)
            weights |= {f"{layer}.self_attn.{name}_proj.{kind}": part for name, part in parts}
        else:
            weights[f"{layer}.{LAYER.get(module, module)}.{what}"] = value
    return weights


def config_of(state: Mapping[str, Tensor]) -> Any:
    """Return the CLIPConfig that open_clip's weights belong to.

    Raises:
        KeyError: They are of another kind of model.
    """
    from transformers import CLIPConfig

    vocabulary, width = state["token_embedding.weight"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    side = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)

    def layers(prefix: str) -> dict[str, Any]:
        numbers = {
            int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(f"{prefix}") and "." in key
        }
        return {
            "num_hidden_layers": len(numbers),
            "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.weight"]),
            "hidden_act": "gelu",
        }

    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": len(state["positional_embedding"]),
        "num_attention_heads": max(1, width // 64),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        **layers("transformer.resblocks."),
    }
    vision = {
        "hidden_size": vision_width,
        "image_size": side,
        "patch_size": patch,
        "num_attention_heads": max(1, vision_width // VISION_HEAD_WIDTHS.get(vision_width, 64)),
        **layers("visual.transformer.resblocks."),
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])
