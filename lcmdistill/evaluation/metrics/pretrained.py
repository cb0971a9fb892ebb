"""Measures that need weights which are on this machine already: FID, CLIP score, LPIPS and preference scorers.

Nothing is downloaded. Shapes: B images, H W pixels, F features.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lcmdistill.diffusion.lpips import Lpips
from lcmdistill.evaluation.metrics.measures import ImagePair, Measure, eight_bit, mean
from lcmdistill.utils.errors import RunError, UsageError

FID_IMAGES = 10_000
"the fewest images of which a FID is given: below, its bias is larger than what it measures"


def fid_measure(network: nn.Module, name: str, reference: Tensor, against: str) -> Measure:
    """FID to a set of images whose features are (M, F) (Heusel et al. 2017). Raises UsageError if M is too small."""
    if len(reference) < FID_IMAGES:
        raise UsageError(
            f"FID needs at least {FID_IMAGES} real images and {against} has {len(reference)}: the covariance of "
            f"{reference.shape[1]} features cannot be told from so few; name more with --real, or go by KID"
        )
    return Measure(
        "FID",
        "lower",
        "How far the drawn images as a set lie from real ones, by Inception features.",
        f"{name}, {reference.shape[1]} features",
        against,
        lambda shown: network(eight_bit(shown.pixels)),
        lambda kept: _frechet(kept, reference),
        published="comparable with FIDs of the same number of images, prompts and real set, taken with the same Inception file",
        decimals=2,
        least=FID_IMAGES,
    )


class _Given(nn.Module):
    """Features that are there already, as torchmetrics wants a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _frechet(features: Tensor, reference: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Given(features.shape[1]))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def clip_measure(folder: str, *, scorer: bool = False) -> Measure:
    """100 cos between CLIP's image and prompt, or a CLIP-shaped scorer's logit, such as PickScore's.

    folder: of a transformers CLIPModel with its processor, or a hub id that is in the local cache. Raises UsageError if
    it is no such model, RunError if it is not on this machine.
    """
    model, processor = _clip(folder, "--scorer" if scorer else "--clip")
    name = Path(folder).name

    def kept(shown: ImagePair) -> Tensor:
        inputs = processor(
            text=list(shown.prompts),
            images=[image.permute(1, 2, 0).numpy() for image in eight_bit(shown.pixels)],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        out = model(**inputs)
        cosine = nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return (cosine * model.logit_scale.exp() if scorer else 100 * cosine).view(-1, 1)

    return Measure(
        f"Score ({name})" if scorer else "CLIP score",
        "higher",
        "How well people would like the picture for its prompt, by a model of their choices."
        if scorer
        else "How well the picture fits its prompt, by CLIP.",
        name,
        "the prompt",
        kept,
        mean,
        published="comparable with scores of the same model on the same prompts",
    )


def _clip(folder: str, option: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    if Path(folder).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UsageError(
            f"{option} {folder} is a bare checkpoint, which does not say how it is run (ImageReward's and HPS's need "
            "packages that this Python's transformers rules out); give the folder of a CLIPModel, such as CLIP or PickScore"
        )
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        if Path(folder).is_dir():
            raise UsageError(
                f"{option} {folder} holds no CLIP model; give the folder of a transformers CLIPModel with its processor"
            ) from error
        raise RunError(
            f"{option} {folder} is neither a folder nor in the local hub cache; download it first (hf download {folder}), or "
            "give the folder of a transformers CLIPModel with its processor"
        ) from error
    if type(model.config).model_type != "clip":
        raise UsageError(f"{option} {folder} is a {model.config.model_type} model; a CLIPModel is needed")
    return model.eval().requires_grad_(False), processor


def lpips_measure(path: Path) -> Measure:
    """LPIPS between the student's picture and the teacher's of the same noise."""
    network = Lpips(path)
    return Measure(
        "LPIPS",
        "lower",
        "How different the picture looks from the teacher's of the same start noise.",
        "LPIPS 0.1, AlexNet",
        "the teacher's full steps from the same noise",
        lambda shown: network(shown.pixels, shown.reference_pixels).view(-1, 1),
        mean,
    )
