"""FID as published protocols compute it: Pillow's resizing, to real images or to the teacher's own, whole and as a patch.

Shapes: B images, H W pixels, F features.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from lcmdistill.data.images import open_image
from lcmdistill.data.sources.registry import make_source
from lcmdistill.evaluation.metrics.base import TEACHER_REFERENCE, ImagePair, Metric, eight_bit
from lcmdistill.evaluation.metrics.pretrained import PATCH, frechet
from lcmdistill.evaluation.metrics.resize import clean_inception_pixels, lanczos_square

_Change = Callable[[Tensor], Tensor]
"uint8 images, (B, 3, H, W), to fp32 pixels of Inception's size"


def whole_image(side: int | None) -> _Change:
    """Return what FID sees of a whole image: its central square, reduced to `side` first where a protocol does so."""

    def change(images: Tensor) -> Tensor:
        return clean_inception_pixels(lanczos_square(images, side or min(images.shape[-2:])))

    return change


def central_patch(images: Tensor) -> Tensor:
    """Return what patch FID sees: the central patch at full resolution, or a smaller image as a whole."""
    height, width = images.shape[-2:]
    if min(height, width) >= PATCH:
        top, left = round((height - PATCH) / 2), round((width - PATCH) / 2)
        images = images[..., top : top + PATCH, left : left + PATCH]
    return clean_inception_pixels(images)


@torch.no_grad()
def real_features(network: nn.Module, source: str, count: int, changes: Sequence[_Change]) -> list[Tensor]:
    """Return the features of a source's first images at their own sizes, (N, F) for each way to look at them.

    Args:
        network: The Inception network.
        source: A data source.
        count: The most images to read.
        changes: The ways to look at an image.
    """
    device = next(network.parameters()).device
    parts: list[list[Tensor]] = [[] for _ in changes]
    images_of = _images(source, count)
    while images := list(islice(images_of, 32)):
        for features, change in zip(parts, changes, strict=True):
            pixels = torch.cat([change(image) for image in images])
            features.append(network(pixels.to(device)).cpu())
    return [torch.cat(features) if features else torch.zeros(0, 1) for features in parts]


def _images(source: str, count: int) -> Iterator[Tensor]:
    """Yield a source's images as uint8, (1, 3, H, W), at their own sizes."""
    members = (member for member in make_source(source).members() if member.image is not None)
    for member in islice(members, count):
        image = open_image(member.image)  # type: ignore[arg-type]
        yield torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def published_fid_metrics(
    network: nn.Module, side: int | None, real: Sequence[Tensor] | None, least: int, words: str
) -> dict[str, Metric]:
    """Return FID and patch FID.

    Args:
        network: The Inception network, on the device that computes it.
        side: The side to which whole images are reduced first; None for none.
        real: The real images' features, whole and patch; None compares with the teacher's own images.
        least: The number of images that the protocol requires.
        words: The protocol, in words.
    """
    device = next(network.parameters()).device
    suffix, target = ("_teacher", " to the teacher") if real is None else ("", "")

    def metric(label: str, description: str, change: _Change, reference: Tensor | None) -> Metric:
        def features(pixels: Tensor) -> Tensor:
            return network(change(eight_bit(pixels).cpu()).to(device))

        def per_image(pair: ImagePair) -> Tensor:
            parts = [pair.pixels] if reference is not None else [pair.pixels, pair.reference_pixels]
            return torch.cat([features(part) for part in parts], dim=1)

        def reduce(values: Tensor) -> float:
            return frechet(values, reference) if reference is not None else frechet(*values.chunk(2, dim=1))

        return Metric(
            f"{label}{target}",
            "lower",
            description,
            "Inception features, resized as by clean-fid",
            TEACHER_REFERENCE if reference is None else f"{len(reference):,} real images",
            per_image,
            reduce,
            published=f"comparable within the protocol {words}, with its deviations",
            decimals=2,
            min_images=least,
        )

    whole, patch = (None, None) if real is None else real
    return {
        f"fid{suffix}": metric(
            "FID", "Distance between the sets of images, by their content.", whole_image(side), whole
        ),
        f"patch_fid{suffix}": metric(
            "Patch FID", f"The same for the central {PATCH} x {PATCH} pixels: fine detail.", central_patch, patch
        ),
    }
