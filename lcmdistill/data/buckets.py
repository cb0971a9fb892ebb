"""Aspect-ratio buckets: the few sizes that images are cut to, so that a batch has one shape and little is cut off."""

import math
import re
from collections.abc import Sequence

from lcmdistill.config.schema import DataConfig
from lcmdistill.utils.errors import UsageError

Size = tuple[int, int]
"height and width in pixels"

RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
"width : height of the buckets that nobody chose, as in diffusers"


def bucket_sizes(config: DataConfig, multiple: int) -> list[Size]:
    """The sizes that `data.buckets` asks for; [] if it does not. multiple: of what the teacher's sides must be, in pixels.

    "auto" is RATIOS at as many pixels as the square of `data.resolution` has, their sides rounded to 64 px, or to an eighth of
    the resolution where that is less. Raises UsageError on a size that is none, or cannot be.
    """
    if config.buckets is None:
        return []
    if config.buckets == ("auto",):
        return equal_areas(config.resolution, bucket_step(config.resolution, multiple))
    if "auto" in config.buckets:
        raise UsageError(f"data.buckets is {', '.join(config.buckets)}; auto stands alone: leave it or the sizes out")
    found = []
    for text in config.buckets:
        sides = re.fullmatch(r"(\d+)x(\d+)", text)
        if not sides:
            raise UsageError(f"data.buckets is {text!r}; it must be auto, or sizes as HEIGHTxWIDTH, such as 512x768")
        size = int(sides[1]), int(sides[2])
        if not all(size) or any(side % multiple for side in size):
            near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in size)
            raise UsageError(f"data.buckets is {text!r}; its sides must be multiples of {multiple}: try {near}")
        found.append(size)
    return sorted(set(found))


def bucket_step(resolution: int, multiple: int) -> int:
    """What sides are rounded to: `multiple` doubled up to 64 and an eighth of the resolution."""
    step = multiple
    while 2 * step <= min(64, resolution // 8):
        step *= 2
    return step


def equal_areas(resolution: int, step: int) -> list[Size]:
    """RATIOS at resolution^2 pixels, each side a multiple of step."""
    sizes: dict[Size, None] = {}
    for wide, high in RATIOS:
        height = (resolution * resolution * high / wide) ** 0.5
        sides = (max(step, round(side / step) * step) for side in (height, height * wide / high))
        sizes[next(sides), next(sides)] = None
    return list(sizes)


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to an image's: the one of which least is cut off."""
    return min(sizes, key=lambda size: abs(math.log(height * size[1]) - math.log(width * size[0])))


def largest(config: DataConfig, multiple: int) -> Size:
    """The size that takes most memory: of the buckets, and of the square that everything else is cut to."""
    square = config.resolution, config.resolution
    return max([square, *bucket_sizes(config, multiple)], key=lambda size: size[0] * size[1])
