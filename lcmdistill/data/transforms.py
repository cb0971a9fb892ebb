"""Turn a member into pixels and a caption, or into the reason why it cannot be used.

Shapes: H = W = the resolution, or those of a bucket.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.buckets import Size, nearest
from lcmdistill.data.images import ImageError, open_image
from lcmdistill.data.sources.base import Member
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.teachers.family import Frame, needs_caption, whole_frame

LONGEST_CAPTION = 20_000
"characters; no text encoder reads more of them, and a tokenizer takes minutes for megabytes"


@dataclass(frozen=True)
class Sample:
    """A usable member.

    Attributes:
        caption: The caption, its white space joined.
        pixels: (3, H, W) fp32 in [-1, 1]; None where the teacher generates the image.
        frame: Where in the original image the pixels lie.
    """

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
    """Decide whether a member is kept, and transform it. No other code makes this decision.

    A filter that is not set drops nothing, and a member without the metadata that a filter looks at passes it.

    Args:
        member: What a source yielded.
        config: Filters, resolution, crop and flip.
        seed: With the place it decides crop and flip.
        place: The member's index in its source.
        rejects: The teacher's check of a caption: a reason, or None.
        sizes: The buckets, of which each image goes to the nearest; () for the square of the resolution.

    Returns:
        The sample, or the reason why there is none. No member raises an exception, whatever its bytes are.
    """
    if member.problem:
        return Rejected(member.problem)
    try:
        caption = " ".join((member.caption or "").replace("\ufeff", "").split())  # byte order marks that others decoded
        caption.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, which no tokenizer takes
        return Rejected("caption is not valid Unicode")
    if len(caption) > LONGEST_CAPTION:
        return Rejected(f"caption longer than {LONGEST_CAPTION:,} characters")
    if reason := rejects(caption):
        return Rejected(reason)
    if config.max_watermark is not None and _number(member.meta.get("pwatermark")) > config.max_watermark:
        return Rejected(f"pwatermark above {config.max_watermark:g}")
    if member.image is None:
        return Sample(caption, None, whole_frame(config.resolution, config.resolution))
    try:
        image = open_image(member.image)
    except ImageError as error:
        return Rejected(str(error))
    except OSError as error:
        return Rejected(f"unreadable file ({type(error).__name__})")
    if min(image.size) < config.min_size:
        return Rejected(f"smaller than {config.min_size} px")
    draw = random.Random(derive_seed(seed, "transform", place))
    size = nearest(image.height, image.width, sizes or [(config.resolution, config.resolution)])
    return Sample(caption, *transform(image, size, config.crop, config.flip, draw))


def _number(value: Any) -> float:
    """Return a number from metadata, where a table holds text; anything that is not a number is below every limit."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return -math.inf


def transform(image: Image.Image, size: Size, crop: str, flip: bool, draw: random.Random) -> tuple[Tensor, Frame]:
    """Crop the largest part of an image that has a size's shape, and resize it.

    Args:
        image: In mode "RGB".
        size: Height and width of the result.
        crop: "center" or "random".
        flip: Whether half of the images are mirrored.
        draw: Source of the random numbers.

    Returns:
        The pixels, (3, H, W) fp32 in [-1, 1], and their frame.
    """
    (width, height), (high, wide) = image.size, size
    part = min(width, max(1, round(height * wide / high))), min(height, max(1, round(width * high / wide)))
    spare = [length - side for length, side in zip(image.size, part, strict=True)]
    left, top = (draw.randint(0, s) for s in spare) if crop == "random" else (s // 2 for s in spare)
    # In one step: resized as a whole, an image that is one pixel high would fill the memory.
    box = (left, top, left + part[0], top + part[1])
    image = image.resize((wide, high), Image.Resampling.LANCZOS, box=box)
    if flip and draw.random() < 0.5:
        image, left = ImageOps.mirror(image), spare[0] - left  # where the crop lies in the mirrored image
    top, left = round(top * high / part[1]), round(left * wide / part[0])
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
    return pixels, (height, width, top, left, high, wide)
