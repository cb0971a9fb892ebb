"""How much of a long prompt a pipeline reads."""

from collections.abc import Sequence
from inspect import signature
from typing import Any


def token_limit(pipeline: Any) -> int:
    """Return how many tokens of a prompt the text encoder reads, start and end included; 0 if there are no prompts."""
    if pipeline.components.get("tokenizer") is None:
        return 0
    limit = signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
    return limit.default if limit else pipeline.tokenizer.model_max_length


def count_truncated(pipeline: Any, prompts: Sequence[str]) -> int:
    """Count the prompts that have more tokens than are read, by any of a pipeline's tokenizers."""
    limit, truncated = token_limit(pipeline), set()
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None and prompts:
            ids = tokenizer(list(prompts), verbose=False).input_ids
            truncated |= {i for i, tokens in enumerate(ids) if len(tokens) > limit}
    return len(truncated)
