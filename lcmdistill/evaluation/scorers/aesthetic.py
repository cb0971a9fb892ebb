"""LAION's aesthetic predictors: a small linear network on CLIP ViT-L/14's embedding of the image.

The first version has one layer, the second (Schuhmann 2022, "improved-aesthetic-predictor") five.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcmdistill.evaluation.scorers.base import ScoreFunction, Scorer, companion, fill, read_tensors, weights_file
from lcmdistill.evaluation.scorers.clip import load_clip
from lcmdistill.evaluation.scorers.head import head_of
from lcmdistill.utils.errors import RunError, UsageError

FILES = ("sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth")

CLIP_ID = "openai/clip-vit-large-patch14"


def _load(word: str, device: torch.device) -> ScoreFunction:
    path = weights_file(word, FILES, AESTHETIC.key, AESTHETIC.weights)
    found = head_of(read_tensors(path, AESTHETIC.key))
    if found is None:
        raise UsageError(
            f"--scorer {AESTHETIC.key}={word} is not one of LAION's linear heads (those with activations have their layers "
            f"at other indices and are not supported); pass {AESTHETIC.weights}"
        )
    head, state = found
    fill(head, state, path, AESTHETIC.key)
    head.to(device)
    width = next(iter(head.parameters())).shape[1]
    folder = companion(path, (CLIP_ID.split("/")[1], "clip"), CLIP_ID)
    if folder is None:
        raise RunError(
            f"--scorer {AESTHETIC.key}={word} needs {CLIP_ID}; put its folder next to {path.name}, or fetch it: hf download "
            f"{CLIP_ID}"
        )
    clip = load_clip(str(folder), device, AESTHETIC.key, f"{CLIP_ID} next to the head")
    if clip.model.config.projection_dim != width:
        raise UsageError(
            f"--scorer {AESTHETIC.key}={word}: {folder} has {clip.model.config.projection_dim} features and the head takes "
            f"{width}; use {CLIP_ID}"
        )

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return head(clip.image_features(images)).squeeze(1)

    return score


AESTHETIC = Scorer(
    key="aesthetic",
    label="Aesthetic score",
    description="Predicted rating of the image alone, from 1 to 10, as by the users of photo and art sites.",
    measured_on="CLIP ViT-L/14's features of the image",
    limits="It ignores the prompt, sees 224 px, and favors polished paintings and portraits.",
    weights=f"{FILES[0]} of github.com/christophschuhmann/improved-aesthetic-predictor",
    load=_load,
    compared_with="nothing",
)
