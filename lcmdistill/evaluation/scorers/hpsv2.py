"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341): open_clip's ViT-H/14, fine-tuned on preferences."""

from typing import Any

import torch

from lcmdistill.evaluation.scorers.base import ScoreFunction, Scorer, fill, read_tensors, weights_file
from lcmdistill.evaluation.scorers.clip import Clip, clip_tokenizer, plain_pixels
from lcmdistill.evaluation.scorers.open_clip import config_of, transformers_weights
from lcmdistill.utils.errors import UsageError

FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")


def _load(word: str, device: torch.device) -> ScoreFunction:
    from transformers import CLIPModel

    path = weights_file(word, FILES, HPSV2.key, HPSV2.weights)
    values = read_tensors(path, HPSV2.key)
    state = values.get("state_dict", values)
    try:
        model: Any = CLIPModel(config_of(state))
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"--scorer {HPSV2.key}={word} holds no open_clip model; pass {HPSV2.weights}") from error
    fill(model, transformers_weights(state), path, HPSV2.key)
    model.to(device)
    # The authors fit the longer edge and pad with black, where CLIP itself cuts.
    clip = Clip(model, clip_tokenizer(), plain_pixels(model, pad=True))
    return clip.cosine


HPSV2 = Scorer(
    key="hpsv2",
    label="HPSv2",
    description="Predicted human preference for the image, given its prompt: a cosine, mostly between .2 and .35.",
    measured_on="HPSv2's features of the image and of the prompt",
    limits="It sees 224 px and 77 tokens, favors vivid colors and contrast, and v2 and v2.1 have different scales.",
    weights="HPS_v2.1_compressed.pt or HPS_v2_compressed.pt of the hub's xswu/HPSv2, or this id",
    load=_load,
    decimals=4,
)
