"""From a member to pixels and a caption, or to the reason why not. Pillow only.

Shapes: H = W = the resolution, or those of a bucket.
"""

import io
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.buckets import Size, nearest
from lcmdistill.data.sources.base import Member
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.teachers.base import Frame, needs_caption, whole_frame


@dataclass(frozen=True)
class Sample:
    """A usable member. pixels: (3, H, W) fp32 in [-1, 1], or None where the teacher is to draw it; frame: how it was cut."""

    caption: str
    pixels: Tensor | None
    frame: Frame


@dataclass(frozen=True)
class Rejected:
    """A member that cannot be used, and why."""

    reason: str


def check_sample(
    member: Member,
    config: DataConfig,
    seed: int,
    place: int,
    rejects: Callable[[str], str | None] = needs_caption,
    sizes: Sequence[Size] = (),
) -> Sample | Rejected:
    """The one predicate that decides what is kept, and the transform of what is.

    A filter that was not asked for drops nothing, and a metadata key that is absent passes. place: the member's place
    in its source, which with the seed decides crop and flip; rejects: the teacher's; sizes: the buckets, of which each image
    goes to the nearest, by default the square of the resolution.
    """
    if member.problem:
        return Rejected(member.problem)
    caption = " ".join((member.caption or "").split())
    if reason := rejects(caption):
        return Rejected(reason)
    if config.max_watermark is not None and _number(member.meta.get("pwatermark")) > config.max_watermark:
        return Rejected(f"pwatermark above {config.max_watermark:g}")
    if member.image is None:
        return Sample(caption, None, whole_frame(config.resolution, config.resolution))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a broken EXIF block is no reason to speak up
            image = _on_white(Image.open(io.BytesIO(member.image) if isinstance(member.image, bytes) else member.image))
    except Image.DecompressionBombError:
        return Rejected("image too large")
    except Exception:  # a decoder that is fed rubbish raises whatever its own code stumbles over
        return Rejected("corrupt image")
    if min(image.size) < config.min_size:
        return Rejected(f"smaller than {config.min_size} px")
    draw = random.Random(derive_seed(seed, "transform", place))
    size = nearest(image.height, image.width, sizes or [(config.resolution, config.resolution)])
    return Sample(caption, *transform(image, size, config.crop, config.flip, draw))


def _number(value: Any) -> float:
    """A number from metadata, which a table holds as text; what is absent or no number is below every limit."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return -math.inf


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, upright by its EXIF orientation, transparency composed on white."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def transform(image: Image.Image, size: Size, crop: str, flip: bool, draw: random.Random) -> tuple[Tensor, Frame]:
    """A part of the size's shape, as large as fits, resized, mirrored perhaps: (3, H, W) fp32 in [-1, 1], and its frame."""
    (width, height), (high, wide) = image.size, size
    kept = min(width, max(1, round(height * wide / high))), min(height, max(1, round(width * high / wide)))
    spare = [length - part for length, part in zip(image.size, kept, strict=True)]
    left, top = (draw.randint(0, s) for s in spare) if crop == "random" else (s // 2 for s in spare)
    # In one go: resized as a whole, an image of one pixel's height would fill the memory.
    box = (left, top, left + kept[0], top + kept[1])
    image = image.resize((wide, high), Image.Resampling.LANCZOS, box=box)
    if flip and draw.random() < 0.5:
        image, left = ImageOps.mirror(image), spare[0] - left  # where the crop lies in the mirrored image
    top, left = round(top * high / kept[1]), round(left * wide / kept[0])
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
    return pixels, (height, width, top, left, high, wide)
