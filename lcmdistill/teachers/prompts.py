"""How much of a long prompt a pipeline reads."""

from collections.abc import Sequence
from inspect import signature
from typing import Any


def token_limit(pipeline: Any) -> int:
    """Return how many tokens of a prompt the text encoders read, start and end included; 0 if there are no prompts.

    Of several text encoders it is the one that reads most: Stable Diffusion 3's T5, where there is one.
    """
    return max((limit for limit, _ in _tokenizers(pipeline)), default=0)


def count_truncated(pipeline: Any, prompts: Sequence[str]) -> int:
    """Count the prompts that have more tokens than are read, by any of the tokenizers that read most."""
    longest, truncated = token_limit(pipeline), set[int]()
    for limit, tokenizer in _tokenizers(pipeline):
        if limit == longest and prompts:
            ids = tokenizer(list(prompts), verbose=False).input_ids
            truncated |= {i for i, tokens in enumerate(ids) if len(tokens) > limit}
    return len(truncated)


def _tokenizers(pipeline: Any) -> list[tuple[int, Any]]:
    """Return (limit, tokenizer) of each text encoder that a pipeline has."""
    encode = getattr(pipeline, "encode_prompt", None)
    limit = signature(encode).parameters.get("max_sequence_length") if encode else None
    return [
        (min(part.model_max_length, limit.default) if limit else part.model_max_length, part)
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer")
        and part is not None
        and pipeline.components.get(name.replace("tokenizer", "text_encoder")) is not None
    ]
