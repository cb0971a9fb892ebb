"""Prompts as pipelines take them: SDXL's embeddings, and how much of a long prompt is read.

Shapes: B batch, L tokens, D width of both of SDXL's encoders together, P width of the second one's pooled output.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sdxl_embeddings(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(B, L, D) and pooled (B, P), the empty prompt's by the pipeline's own rule, without the layers that it is to skip."""
    device, skip = pipeline.text_encoder.device, pipeline.config.get("_clip_skip") or None
    embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, device, 1, False, clip_skip=skip)
    if pipeline.config.force_zeros_for_empty_prompt:
        told = torch.tensor([bool(prompt) for prompt in prompts], device=device)
        embeds, pooled = embeds * told[:, None, None], pooled * told[:, None]
    return embeds, pooled


def prompt_kwargs(pipeline: Any, prompts: Sequence[str], negative: str | None = None) -> dict[str, Any]:
    """How a pipeline is told prompts, and one negative prompt for all of them.

    As embeddings where SDXL is to skip layers: by itself it skips none for the negative prompt, which was trained with as many.
    """
    if not pipeline.config.get("_clip_skip"):
        told: dict[str, Any] = {"prompt": list(prompts)}
        return told if negative is None else told | {"negative_prompt": [negative] * len(prompts)}
    embeds, pooled = sdxl_embeddings(pipeline, prompts)
    null, null_pooled = sdxl_embeddings(pipeline, [negative or ""] * len(prompts))
    told = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    return told | {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}


def token_limit(pipeline: Any) -> int:
    """The tokens of a prompt that a pipeline's text encoder reads, begin and end among them; 0 if it takes no prompt."""
    if pipeline.components.get("tokenizer") is None:
        return 0
    own = signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
    return own.default if own else pipeline.tokenizer.model_max_length


def count_truncated(pipeline: Any, prompts: Sequence[str]) -> int:
    """How many prompts have more tokens than are read, by any of a pipeline's tokenizers."""
    limit, long = token_limit(pipeline), set()
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None and prompts:
            found = tokenizer(list(prompts), verbose=False).input_ids
            long |= {i for i, tokens in enumerate(found) if len(tokens) > limit}
    return len(long)
