"""The preview images of a sweep point: few and small, for the report, with checksums in the point's numbers.json."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from lcmdistill.utils.checksums import checksum, read_checked_json

PREVIEWS = 6
"images per point that are saved for the report"

_PREVIEW_SIDE = 256


def preview_indices(count: int) -> list[int]:
    """Return the indices of the images to save for the report, spread over the set."""
    return [i * count // PREVIEWS for i in range(PREVIEWS)] if count > PREVIEWS else list(range(count))


def write_previews(images: Mapping[int, Image.Image], folder: Path) -> dict[str, str]:
    """Write images as 00.webp, 01.webp, ..., small enough for a page, and return the checksums of the files by name."""
    indices = sorted(images)
    for i, preview in images.items():
        preview.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.LANCZOS)
        preview.save(folder / preview_name(indices.index(i)), quality=90, method=6)
    return {path.name: checksum(path) for path in sorted(folder.glob("*.webp"))}


def preview_name(index: int) -> str:
    """Return the name of a preview's file. index: of its prompt among the previewed ones."""
    return f"{index:02d}.webp"


def damaged_previews(folder: Path) -> dict[str, str]:
    """Return the previews of a point that are not what was written, {name: what is wrong}.

    Earlier versions recorded no checksums, and nothing is found in their points.
    """
    recorded = read_checked_json(folder / "numbers.json").get("previews", {})
    states = {}
    for name, expected in recorded.items():
        path = folder / name
        if not path.is_file() or checksum(path) != expected:
            states[name] = "damaged" if path.is_file() else "missing"
    return states
