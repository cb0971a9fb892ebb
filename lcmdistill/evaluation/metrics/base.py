"""The contract of a metric, and what metrics share.

A metric has two parts: values per image, and a reduction over the set. The values are (N, K) however the N images were cut
into batches, and sums over them are fp64, so the batch size does not change the result.
Shapes: N images, B images per batch, C h w latents, H W pixels, K values per image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lcmdistill.utils.errors import UsageError

TEACHER_REFERENCE = "the teacher's full steps from the same noise"


class ImagePair(NamedTuple):
    """A batch of images with their reference images, from the same prompts and the same start noise.

    Attributes:
        latents: (B, C, h, w).
        pixels: (B, 3, H, W) in [0, 1].
        reference_latents: (B, C, h, w).
        reference_pixels: (B, 3, H, W) in [0, 1].
        prompts: B prompts.
    """

    latents: Tensor
    pixels: Tensor
    reference_latents: Tensor
    reference_pixels: Tensor
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """One metric of a set of images.

    Attributes:
        label: The name in tables and charts.
        better: Which values are good; "one" is for ratios to the teacher.
        description: What the metric shows, in one sentence.
        measured_on: The features that it looks at.
        compared_with: The reference.
        per_image: Images to values, (B, K).
        reduce: The values of a set, (N, K) fp64, to the number.
        published: Whether the numbers are comparable with published ones.
        decimals: How many decimals are recorded.
        min_images: The number of images below which there is no result.
        standard_error: The values of a set, (N, K) fp64, to the standard error of the number; None if it has none.
        limits: What the features cannot see, in one sentence; "" if the description states it.
    """

    label: str
    better: Literal["lower", "higher", "one"]
    description: str
    measured_on: str
    compared_with: str
    per_image: Callable[[ImagePair], Tensor]
    reduce: Callable[[Tensor], float]
    published: str = "not comparable"
    decimals: int = 3
    min_images: int = 1
    standard_error: Callable[[Tensor], float] | None = None
    limits: str = ""


def mean(values: Tensor) -> float:
    """Return the mean over images. values: (N, 1)."""
    return float(values.mean())


def eight_bit(pixels: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to the uint8 of an image file, which feature networks take."""
    return (pixels * 255).round().to(torch.uint8)


def center_square(pixels: Tensor) -> Tensor:
    """Cut images to their central square, (B, 3, H, W) -> (B, 3, S, S). Real images are cut in the same way."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[..., top : top + side, left : left + side]


def check_count(metric: Metric, count: int) -> None:
    """Raise UsageError if there are too few images for a metric."""
    if count < metric.min_images:
        raise UsageError(
            f"{metric.label} needs at least {metric.min_images} images, and --num-images is {count}; raise it, or remove "
            "the metric's option"
        )
