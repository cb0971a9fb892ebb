"""Resizing with Pillow, as the published scores do it: other filters give other scores.

Shapes: B images, H W pixels, S the side of a square.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

INCEPTION_SIDE = 299


def _each(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Apply a function of Pillow images to uint8 images, (B, 3, H, W)."""
    arrays = (np.asarray(change(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images.cpu())
    return torch.stack([torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays])


def lanczos_square(images: Tensor, side: int) -> Tensor:
    """Cut uint8 images to their central square and resize it, (B, 3, H, W) -> (B, 3, side, side)."""

    def change(image: Image.Image) -> Image.Image:
        return _center(image, min(image.size)).resize((side, side), Image.Resampling.LANCZOS)

    return _each(images, change)


def clip_pixels(images: Tensor, side: int, *, pad: bool = False) -> Tensor:
    """Return uint8 images as CLIP's vision model takes them, (B, 3, side, side).

    Args:
        images: uint8, (B, 3, H, W).
        side: The side in pixels.
        pad: Whether to fit the longer edge and pad with black, instead of fitting the shorter one and cutting.
    """

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        if pad:
            scale = side / max(width, height)
            fitted = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
            square = Image.new("RGB", (side, side))
            square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
            return square
        shorter = min(width, height)
        size = (int(side * width / shorter), int(side * height / shorter))
        return _center(image.resize(size, Image.Resampling.BICUBIC), side)

    pixels = _each(images, change).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _center(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def clean_inception_pixels(images: Tensor) -> Tensor:
    """Resize uint8 images for Inception as clean-fid does (Parmar et al. 2022), (B, 3, H, W) -> fp32 (B, 3, 299, 299).

    Each channel is resized in fp32 by Pillow's bicubic filter, which does not alias, and the result is not rounded.
    """
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    channels = [
        np.asarray(Image.fromarray(channel.float().numpy()).resize(size, Image.Resampling.BICUBIC))
        for image in images.cpu()
        for channel in image
    ]
    return torch.from_numpy(np.stack(channels)).view(len(images), 3, *size)
