"""The metrics that need no weights. Every evaluation and every validation computes them.

Shapes: N images, B images per batch, H W pixels, K values per image.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lcmdistill.evaluation.metrics.base import TEACHER_REFERENCE, ImagePair, Metric, mean

MIN_CHROMA = 0.02
"mean chroma, 5 of 255, below which images count as gray: their little saturation is noise"


def root_mean(values: Tensor) -> float:
    """Return the root of the mean over images. values: (N, 1), squared."""
    return float(values.mean().sqrt())


def ratio(values: Tensor, floor: float = 1e-12) -> float:
    """Return the images' mean divided by the reference's, 1 if both are below `floor`. values: (N, 2)."""
    images, reference = values.mean(0).clamp(min=floor)
    return float(images / reference)


def spread_ratio(values: Tensor) -> float:
    """Return the spread among the images divided by the spread among the reference. values: (N, 2 K)."""
    images, reference = values.var(0, correction=0).view(2, -1).mean(1).sqrt()
    return float(images / reference.clamp(min=1e-12))


def squared_distance(pair: ImagePair) -> Tensor:
    """Return the mean squared difference of latents, (B, 1)."""
    return (pair.latents.double() - pair.reference_latents.double()).square().flatten(1).mean(1, keepdim=True)


def ssim(pair: ImagePair) -> Tensor:
    """Return the structural similarity of pixels, (B, 1) (Wang et al. 2004, with the usual 11 x 11 Gaussian window)."""
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    values = similarity(pair.pixels, pair.reference_pixels, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.view(-1, 1)


def sharpness(pixels: Tensor) -> Tensor:
    """Return the variance of the luma's Laplacian, (B,): low for blur, high for noise."""
    luma = (pixels * torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=pixels.device)
    return nn.functional.conv2d(luma, kernel.view(1, 1, 3, 3)).flatten(1).var(1)


def saturation(pixels: Tensor) -> Tensor:
    """Return the mean chroma (largest minus smallest channel of a pixel), (B,)."""
    return (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1)


def thumbnails(pixels: Tensor) -> Tensor:
    """Return images of 8 x 8 pixels, (B, 192)."""
    return nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)


def _of_both(statistic: Callable[[Tensor], Tensor]) -> Callable[[ImagePair], Tensor]:
    """Apply a statistic to the images and to their reference."""

    def per_image(pair: ImagePair) -> Tensor:
        both = [statistic(part).view(len(part), -1) for part in (pair.pixels, pair.reference_pixels)]
        return torch.cat(both, 1)

    return per_image


def latent_rmse(a: Tensor, b: Tensor) -> float:
    """Return the root mean squared difference of latents, over all images."""
    return float((a.double() - b.double()).square().mean().sqrt())


BASIC_METRICS: dict[str, Metric] = {
    "rmse": Metric(
        "Latent RMSE",
        "lower",
        "Distance of the latents from the teacher's, from the same start noise.",
        "VAE latents",
        TEACHER_REFERENCE,
        squared_distance,
        root_mean,
    ),
    "ssim": Metric(
        "SSIM",
        "higher",
        "Similarity to the teacher's image, pixel by pixel; 1 is identical.",
        "pixels, 11 x 11 Gaussian window",
        TEACHER_REFERENCE,
        ssim,
        mean,
    ),
    "sharpness": Metric(
        "Sharpness",
        "one",
        "Fine detail, relative to the teacher: below 1 is blur, above 1 is noise or over-sharpening.",
        "variance of the luma's Laplacian",
        TEACHER_REFERENCE,
        _of_both(sharpness),
        ratio,
    ),
    "saturation": Metric(
        "Saturation",
        "one",
        "Color strength, relative to the teacher: below 1 is washed out, above 1 is oversaturated.",
        "mean chroma of pixels",
        TEACHER_REFERENCE,
        _of_both(saturation),
        partial(ratio, floor=MIN_CHROMA),
    ),
    "diversity": Metric(
        "Diversity",
        "one",
        "Differences between images, relative to the teacher; near 0, all images look alike.",
        "spread of 8 x 8 thumbnails over the set",
        TEACHER_REFERENCE,
        _of_both(thumbnails),
        spread_ratio,
        min_images=2,
    ),
}
