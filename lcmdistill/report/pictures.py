"""Images as data: URIs, so that a page is a single file."""

import base64
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lcmdistill.data.images import ImageError, open_image

logger = logging.getLogger(__name__)

MAX_GRIDS = 12
"validation grids on a page"

_GRID_WIDTH = 900


@dataclass(frozen=True)
class Picture:
    """An image on a page.

    Attributes:
        src: A data: URI.
        alt: A description for readers who cannot see it.
        width: The width in pixels.
        height: The height in pixels.
        name: The label of a control that selects it.
    """

    src: str
    alt: str
    width: int
    height: int
    name: str = ""


def embedded(path: Path, alt: str) -> Picture | None:
    """Embed a WebP or PNG file unchanged. A damaged one is logged, and None is returned."""
    try:
        width, height = open_image(path).size
    except (ImageError, OSError) as error:
        logger.warning(f"{path} is left out of the report: {error}")
        return None
    kind = path.suffix.removeprefix(".")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{data}", alt, width, height)


def validation_grids(folder: Path, steps: Iterable[int] = ()) -> list[Picture]:
    """Embed the validation grids of a run, oldest first and reduced; at most MAX_GRIDS, spread over the run.

    Args:
        folder: RUN/samples.
        steps: The steps that were validated; a grid that is missing is logged.
    """
    missing = [name for step in steps if not (folder / (name := f"step-{step:06d}.png")).is_file()]
    if missing:
        logger.warning(f"{folder} lacks {len(missing)} validation grids, such as {missing[0]}")
    paths = sorted(path for path in folder.glob("step-*.png") if path.stem.removeprefix("step-").isdecimal())
    if len(paths) > MAX_GRIDS:
        paths = [paths[i * (len(paths) - 1) // (MAX_GRIDS - 1)] for i in range(MAX_GRIDS)]
    pictures = []
    for path in paths:
        step = int(path.stem.removeprefix("step-"))
        try:
            small = open_image(path)
        except (ImageError, OSError) as error:  # an interrupted run may leave half a file
            logger.warning(f"{path} is left out of the report: {error}")
            continue
        small.thumbnail((_GRID_WIDTH, 10 * _GRID_WIDTH), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=82, method=6)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        alt = f"Validation images after {step} training steps: one row per prompt, one column per number of sampling steps"
        pictures.append(Picture(f"data:image/webp;base64,{data}", alt, *small.size, name=f"{step}"))
    return pictures
