"""What is measured of drawn images, each measure in two parts: what is kept of an image, and what a set of those makes.

Whatever is kept is (N, K), however the N images were cut into batches, and sums over it are fp64: the batch size decides
nothing. Shapes: N images, B of them at once, C h w latents, H W pixels, F features, K numbers kept of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lcmdistill.utils.errors import UsageError

GREY = 0.02
"mean chroma below which pictures are grey, five of 255: what little there is is nobody's choice"

KID_BLOCK = 1000
"images that are compared with each other at once: the kernel matrix is as large as this squared"


class ImagePair(NamedTuple):
    """Some images and what they stand beside, all of the same prompts and the same start noise.

    latents, reference_latents: (B, C, h, w); pixels, reference_pixels: (B, 3, H, W) in [0, 1]; prompts: B of them.
    """

    latents: Tensor
    pixels: Tensor
    reference_latents: Tensor
    reference_pixels: Tensor
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """One measure of a set of images. better: what is good; decimals: how many of its number are written down.

    kept: images -> (B, K); value: (N, K) fp64 -> the number. label: in a table's head; about: what it tells, in plain
    words; features, against: what it looks at, and what it is compared with; published: whether its figures compare
    with published ones, and with which.
    """

    label: str
    better: Literal["lower", "higher", "one"]
    about: str
    features: str
    against: str
    kept: Callable[[ImagePair], Tensor]
    value: Callable[[Tensor], float]
    published: str = "no published figure"
    decimals: int = 3
    least: int = 1
    "fewer images than this give no number"


def mean(kept: Tensor) -> float:
    """The mean over images. kept: (N, 1)."""
    return float(kept.mean())


def root_mean(kept: Tensor) -> float:
    """The root of the mean over images. kept: (N, 1) of squares."""
    return float(kept.mean().sqrt())


def ratio(kept: Tensor, least: float = 1e-12) -> float:
    """The images' mean by the reference's, 1 where both are below what can be seen, `least`. kept: (N, 2)."""
    own, reference = kept.mean(0).clamp(min=least)
    return float(own / reference)


def spread_ratio(kept: Tensor) -> float:
    """How far images differ from each other, by how far the reference's do. kept: (N, 2 K)."""
    own, reference = kept.var(0, correction=0).view(2, -1).mean(1).sqrt()
    return float(own / reference.clamp(min=1e-12))


def squared_distance(shown: ImagePair) -> Tensor:
    """Mean squared difference of latents, (B, 1)."""
    return (shown.latents.double() - shown.reference_latents.double()).square().flatten(1).mean(1, keepdim=True)


def ssim(shown: ImagePair) -> Tensor:
    """Structural similarity of pixels, (B, 1) (Wang et al. 2004, with the usual 11 x 11 Gaussian window)."""
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    found = similarity(shown.pixels, shown.reference_pixels, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.view(-1, 1)


def sharpness(pixels: Tensor) -> Tensor:
    """Variance of the luma's Laplacian, (B,): low where an image is blurred, high where it is noise."""
    luma = (pixels * torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=pixels.device)
    return nn.functional.conv2d(luma, kernel.view(1, 1, 3, 3)).flatten(1).var(1)


def saturation(pixels: Tensor) -> Tensor:
    """Mean chroma, the largest of a pixel's three values less the smallest, (B,)."""
    return (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1)


def thumbnails(pixels: Tensor) -> Tensor:
    """Images of 8 x 8 pixels, (B, 192)."""
    return nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)


def _of_both(statistic: Callable[[Tensor], Tensor]) -> Callable[[ImagePair], Tensor]:
    """A statistic of the images and of the reference beside it."""

    def kept(shown: ImagePair) -> Tensor:
        both = [statistic(part).view(len(part), -1) for part in (shown.pixels, shown.reference_pixels)]
        return torch.cat(both, 1)

    return kept


_TEACHER = "the teacher's full steps from the same noise"

# What takes no weights: measured in every sweep, and at every validation.
FREE: dict[str, Measure] = {
    "rmse": Measure(
        "Latent RMSE",
        "lower",
        "How far the latents lie from the teacher's own, from the same start noise.",
        "VAE latents",
        _TEACHER,
        squared_distance,
        root_mean,
    ),
    "ssim": Measure(
        "SSIM",
        "higher",
        "How much of the teacher's picture is there, pixel by pixel: 1 is the same picture.",
        "pixels, 11 x 11 Gaussian window",
        _TEACHER,
        ssim,
        mean,
    ),
    "sharpness": Measure(
        "Sharpness",
        "one",
        "Fine detail, by the teacher's: below 1 is blur, above 1 is noise or over-sharpening.",
        "variance of the luma's Laplacian",
        _TEACHER,
        _of_both(sharpness),
        ratio,
    ),
    "saturation": Measure(
        "Saturation",
        "one",
        "Strength of colour, by the teacher's: below 1 is washed out, above 1 is garish.",
        "mean chroma of pixels",
        _TEACHER,
        _of_both(saturation),
        partial(ratio, least=GREY),
    ),
    "diversity": Measure(
        "Diversity",
        "one",
        "How much images differ from prompt to prompt, by the teacher's: near 0 they have all become alike.",
        "spread of 8 x 8 thumbnails over the set",
        _TEACHER,
        _of_both(thumbnails),
        spread_ratio,
        least=2,
    ),
}


def kid_measure(network: nn.Module, name: str, reference: Tensor, against: str) -> Measure:
    """KID to a set of images whose features are (M, F); name: of the feature network."""
    return Measure(
        f"KID ({name})",
        "lower",
        "How far the drawn images as a set lie from the real ones, by features of their content.",
        f"{name}, {reference.shape[1]} features",
        against,
        lambda shown: network(eight_bit(shown.pixels)),
        lambda kept: kid(kept, reference),
        least=2,
    )


def kid(features: Tensor, real: Tensor) -> float:
    """The unbiased Kernel Inception Distance between all of both sets (Binkowski et al. 2018, Eq. 4): a squared MMD.

    features: (N, F); real: (M, F). torchmetrics' kernel, without its random subsets: both sets are cut into blocks of
    one size, as large as the smaller set allows and KID_BLOCK at most, and every pair of blocks is averaged.
    """
    from torchmetrics.image.kid import poly_mmd

    n = min(len(features), len(real), KID_BLOCK)
    values = [
        poly_mmd(features[i : i + n].double(), real[j : j + n].double())
        for i in range(0, len(features) - n + 1, n)
        for j in range(0, len(real) - n + 1, n)
    ]
    return float(torch.stack(values).mean())


def eight_bit(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as the uint8 of an image file, which feature networks take."""
    return (pixels * 255).round().to(torch.uint8)


def latent_rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference of latents, over all images."""
    return float((a.double() - b.double()).square().mean().sqrt())


def check_count(measure: Measure, count: int) -> None:
    """Raise UsageError if a measure says nothing of so few images."""
    if count < measure.least:
        raise UsageError(
            f"{measure.label} needs at least {measure.least} images and {count} are to be drawn; "
            f"raise --num-images, or leave it out"
        )
