"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP's text encoder that looks at the image, and a small network.

Shapes: B images, L tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.evaluation.metrics.resize import clip_pixels
from lcmdistill.evaluation.scorers.base import ScoreFunction, Scorer, companion, fill, read_tensors, weights_file
from lcmdistill.evaluation.scorers.head import head_of
from lcmdistill.utils.errors import RunError, UsageError

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"of the rewards of the authors' training images"

TOKENS = 35

HEAD_WIDTH = 64
"channels per attention head, in both of BLIP's networks"

TOKENIZER = "google-bert/bert-base-uncased"

VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.(\d+)\.norm([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
}
"places in timm's vision transformer, and in transformers"


def split_weights(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights of the "vision" and "text" networks under transformers' names, and those of the "head".

    The projections of BLIP's contrastive loss and the constant positions are dropped.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for key, value in state.items():
        name = key.removeprefix("blip.")
        if name.startswith("visual_encoder."):
            name = name.removeprefix("visual_encoder.")
            for pattern, place in VISION.items():
                name = re.sub(pattern, place, name)
            parts["vision"][name] = value
        elif name.startswith("text_encoder.") and not name.endswith("position_ids"):
            parts["text"][name.removeprefix("text_encoder.")] = value
        elif name.startswith("mlp.layers."):
            parts["head"][name.removeprefix("mlp.")] = value
    return parts


def networks(parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[Any, Any]:
    """Return the networks that the weights belong to, not loaded yet: vision and text.

    Raises:
        KeyError: The weights are of another kind of model.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision, text = parts["vision"], parts["text"]
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    places = vision["embeddings.position_embedding"].shape[1] - 1
    vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
    of_vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(vision, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    of_text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(text, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=max(1, text_width // HEAD_WIDTH),
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        # This only adds the attention to the image: the text itself is read in both directions.
        is_decoder=True,
    )
    return BlipVisionModel(of_vision), BlipTextModel(of_text, add_pooling_layer=False)


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match.group(1) for key in state if (match := re.match(pattern, key))})


def _load(word: str, device: torch.device) -> ScoreFunction:
    from transformers import BertTokenizer

    path = weights_file(word, ("ImageReward.pt",), IMAGE_REWARD.key, IMAGE_REWARD.weights)
    vocabulary = companion(path, ("bert-base-uncased",), TOKENIZER)
    if vocabulary is None and (path.parent / "vocab.txt").is_file():
        vocabulary = path.parent
    if vocabulary is None:
        raise RunError(
            f"--scorer {IMAGE_REWARD.key}={word} needs the tokenizer {TOKENIZER}; put its vocab.txt next to {path.name}, or "
            f"fetch it: hf download {TOKENIZER} vocab.txt"
        )
    tokenizer = BertTokenizer.from_pretrained(vocabulary, do_lower_case=True)
    parts = split_weights(read_tensors(path, IMAGE_REWARD.key))
    found = head_of(parts["head"])
    try:
        vision, text = networks(parts)
    except (KeyError, ValueError):
        found = None
    if found is None:
        raise UsageError(f"--scorer {IMAGE_REWARD.key}={word} holds no ImageReward model; pass {IMAGE_REWARD.weights}")
    head, weights = found
    for module, state in ((vision, parts["vision"]), (text, parts["text"]), (head, weights)):
        fill(module, state, path, IMAGE_REWARD.key)
        module.to(device)
    side = vision.config.image_size

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        seen = vision(pixel_values=clip_pixels(images, side).to(device)).last_hidden_state
        output = text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        )
        return (head(output.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD

    return score


IMAGE_REWARD = Scorer(
    key="imagereward",
    label="ImageReward",
    description="Predicted human preference for the image, given its prompt; about 0 on average over its training images.",
    measured_on="BLIP's features of the image, read together with the prompt",
    limits="It sees 224 px and 35 tokens, and learned from images of 2022's Stable Diffusion and DALL-E models.",
    weights="ImageReward.pt of the hub's THUDM/ImageReward, or this id",
    load=_load,
)
