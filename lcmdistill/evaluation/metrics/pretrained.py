"""Metrics with weights that the user has on disk: FID and LPIPS.

Nothing is downloaded. Shapes: B images, M real images, H W pixels, F features.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lcmdistill.diffusion.lpips import Lpips
from lcmdistill.evaluation.metrics.base import TEACHER_REFERENCE, ImagePair, Metric, center_square, eight_bit, mean
from lcmdistill.utils.errors import UsageError

FID_IMAGES = 10_000
"the smallest set for FID: with fewer images its bias is larger than typical differences"


def fid_metric(network: nn.Module, name: str, reference: Tensor, real_images: str) -> Metric:
    """Return FID to a set of real images (Heusel et al. 2017).

    Args:
        network: The feature network, on the device that computes it.
        name: The feature network's name.
        reference: The real images' features, (M, F).
        real_images: What the real images are, in words.

    Raises:
        UsageError: There are fewer than FID_IMAGES real images.
    """
    if len(reference) < FID_IMAGES:
        raise UsageError(
            f"FID needs at least {FID_IMAGES} real images, and {real_images} has {len(reference)}, too few for the "
            f"covariance of {reference.shape[1]} features; pass more with --real, or use KID"
        )
    device = next(network.parameters()).device
    return Metric(
        "FID",
        "lower",
        "Distance between the set of generated images and real ones, by Inception features.",
        f"{name}, {reference.shape[1]} features",
        real_images,
        lambda pair: network(eight_bit(center_square(pair.pixels)).to(device)),
        lambda features: frechet(features, reference),
        published="comparable for the same number of images, prompts, real images and Inception file",
        decimals=2,
        min_images=FID_IMAGES,
    )


PATCH = 299
"the side of the patches of patch FID, which Inception reads without resizing"


def fid_to_teacher_metrics(network: nn.Module, name: str, resolution: int) -> dict[str, Metric]:
    """Return FID to the teacher's own images at full steps, of whole images and of patches, from the same prompts.

    Patch FID compares the central patch of PATCH pixels at full resolution, and so fine detail (Lin et al. 2024,
    SDXL-Lightning). Smaller images have none.

    Args:
        network: The Inception network, on the device that computes it.
        name: The network's name.
        resolution: The side of the images in pixels.
    """
    device = next(network.parameters()).device

    def both(pair: ImagePair, crop: Callable[[Tensor], Tensor]) -> Tensor:
        parts = (pair.pixels, pair.reference_pixels)
        return torch.cat([network(eight_bit(crop(part)).to(device)) for part in parts], dim=1)

    def metric(label: str, description: str, crop: Callable[[Tensor], Tensor]) -> Metric:
        return Metric(
            label,
            "lower",
            description,
            name,
            TEACHER_REFERENCE,
            lambda pair: both(pair, crop),
            lambda features: frechet(*features.chunk(2, dim=1)),
            published="comparable for the same teacher, its steps and guidance, number of images, prompts and Inception file",
            decimals=2,
            min_images=FID_IMAGES,
        )

    whole = (
        "Distance between the set of generated images and the teacher's, by Inception features: whether style is kept."
    )
    metrics = {"fid_teacher": metric("FID to the teacher", whole, center_square)}
    if resolution >= PATCH:
        detail = f"The same for the central {PATCH} x {PATCH} pixels at full resolution: fine detail."
        metrics["patch_fid_teacher"] = metric("Patch FID to the teacher", detail, _center_patch)
    return metrics


def _center_patch(pixels: Tensor) -> Tensor:
    top, left = ((side - PATCH) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + PATCH, left : left + PATCH]


class _PrecomputedFeatures(nn.Module):
    """An identity with the interface that torchmetrics requires of a feature network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(features: Tensor, reference: Tensor) -> float:
    """Return the Frechet distance between two sets of features, (N, F) and (M, F), as Gaussians."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_PrecomputedFeatures(features.shape[1]))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def lpips_metric(path: Path, device: torch.device) -> Metric:
    """Return LPIPS between the student's image and the teacher's from the same noise, computed on a device."""
    network = Lpips(path).to(device)
    return Metric(
        "LPIPS",
        "lower",
        "Perceptual difference from the teacher's image from the same start noise.",
        "LPIPS 0.1, AlexNet",
        TEACHER_REFERENCE,
        lambda pair: network(pair.pixels.to(device), pair.reference_pixels.to(device)).view(-1, 1),
        mean,
    )
