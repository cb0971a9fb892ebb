"""Pictures as data: URIs, so that a page needs no file beside it."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MOST_GRIDS = 12

_GRID_WIDTH = 900


@dataclass(frozen=True)
class Picture:
    """An image in a page. src: a data: URI; alt: what it shows, for those who do not see it."""

    src: str
    alt: str
    width: int
    height: int
    name: str = ""

    @property
    def side(self) -> int:
        """The width of one that is square."""
        return self.width


def embedded(path: Path, alt: str) -> Picture:
    """A WebP or PNG file as it is."""
    with Image.open(path) as image:
        width, height = image.size
    kind = path.suffix.removeprefix(".")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{data}", alt, width, height)


def validation_grids(folder: Path) -> list[Picture]:
    """The validation grids of a run, oldest first, made smaller; where there are many, some spread over the run."""
    paths = sorted(path for path in folder.glob("step-*.png") if path.stem.removeprefix("step-").isdecimal())
    if len(paths) > MOST_GRIDS:
        paths = [paths[i * (len(paths) - 1) // (MOST_GRIDS - 1)] for i in range(MOST_GRIDS)]
    found = []
    for path in paths:
        step = int(path.stem.removeprefix("step-"))
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
        except OSError:
            continue  # a run that was cut off may have left half a picture
        small.thumbnail((_GRID_WIDTH, 10 * _GRID_WIDTH), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=82, method=6)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        alt = (
            f"Validation pictures after {step} training steps: a row a prompt, columns of 1, 2, 4 and 8 sampling steps"
        )
        found.append(Picture(f"data:image/webp;base64,{data}", alt, *small.size, name=f"{step}"))
    return found
