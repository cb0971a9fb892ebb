"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): a CLIP model that was fine-tuned on users' choices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcmdistill.evaluation.scorers.base import ScoreFunction, Scorer
from lcmdistill.evaluation.scorers.clip import load_clip


def _load(word: str, device: torch.device) -> ScoreFunction:
    clip = load_clip(word, device, PICKSCORE.key, PICKSCORE.weights)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return clip.model.logit_scale.exp() * clip.cosine(images, prompts)

    return score


PICKSCORE = Scorer(
    key="pickscore",
    label="PickScore",
    description="Which image users would choose for a prompt: the logit of a CLIP model that was trained on their choices.",
    measured_on="PickScore's features of the image and of the prompt",
    limits="It sees 224 px and 77 tokens, and learned from images of early Stable Diffusion models and its users' taste.",
    weights="the folder or hub id yuvalkirstain/PickScore_v1",
    load=_load,
)
