"""Aspect-ratio buckets: the few sizes that images are cropped to, so that a batch has one shape and little is cropped."""

import math
import re
from collections.abc import Sequence

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.base import Source
from lcmdistill.utils.errors import UsageError

Size = tuple[int, int]
"height and width in pixels"

RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
"width : height of the default buckets (auto), as in diffusers"


def bucket_sizes(config: DataConfig, multiple: int) -> list[Size]:
    """Return the sizes of `data.buckets`, [] if it is not set.

    "auto" is RATIOS at as many pixels as the square of `data.resolution` has. Their sides are rounded to 64 px, or to an
    eighth of the resolution where that is less.

    Args:
        config: Holds `buckets` and `resolution`.
        multiple: The teacher's sides must be multiples of it, in pixels.

    Raises:
        UsageError: If a size is not one, or is not possible.
    """
    if config.buckets is None:
        return []
    if config.buckets == ("auto",):
        return equal_areas(config.resolution, bucket_step(config.resolution, multiple))
    if "auto" in config.buckets:
        raise UsageError(f"data.buckets is {', '.join(config.buckets)}; use either auto or sizes")
    sizes = []
    for text in config.buckets:
        sides = re.fullmatch(r"(\d+)x(\d+)", text)
        if not sides:
            raise UsageError(f"data.buckets is {text!r}; it must be auto, or sizes as HEIGHTxWIDTH, such as 512x768")
        size = int(sides[1]), int(sides[2])
        if not all(size) or any(side % multiple for side in size):
            near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in size)
            raise UsageError(f"data.buckets is {text!r}; its sides must be multiples of {multiple}: try {near}")
        sizes.append(size)
    return sorted(set(sizes))


def buckets_for(source: Source, config: DataConfig, multiple: int) -> list[Size]:
    """Return the sizes that a source's images are cropped to, [] for the square, which is all that a teacher generates."""
    return [] if source.is_generated else bucket_sizes(config, multiple)


def bucket_step(resolution: int, multiple: int) -> int:
    """Return what sides are rounded to: `multiple`, doubled while at most 64 and an eighth of the resolution."""
    step = multiple
    while 2 * step <= min(64, resolution // 8):
        step *= 2
    return step


def equal_areas(resolution: int, step: int) -> list[Size]:
    """Return RATIOS at resolution^2 pixels, each side a multiple of step."""
    sizes: dict[Size, None] = {}
    for wide, high in RATIOS:
        height = (resolution * resolution * high / wide) ** 0.5
        sides = (max(step, round(side / step) * step) for side in (height, height * wide / high))
        sizes[next(sides), next(sides)] = None
    return list(sizes)


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """Return the size whose aspect ratio is nearest to an image's, where the least is cropped."""
    return min(sizes, key=lambda size: abs(math.log(height * size[1]) - math.log(width * size[0])))


def largest(config: DataConfig, multiple: int) -> Size:
    """Return the size that takes the most memory, among the buckets and the square of the resolution."""
    square = config.resolution, config.resolution
    return max([square, *bucket_sizes(config, multiple)], key=lambda size: size[0] * size[1])
