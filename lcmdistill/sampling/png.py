"""Image files: PNGs with their settings embedded, and grids of labeled images."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lcmdistill.utils.errors import UsageError

MIN_GRID_SIDE = 96
"images with a shorter long side are doubled in a grid until they reach it"


@dataclass(frozen=True)
class GeneratedImage:
    """One image with the prompt and the seed that it was generated from."""

    image: Image.Image
    prompt: str
    seed: int


class ImageFolder:
    """Write images as PNGs with their settings in the name and in the metadata. No file is ever overwritten.

    Args:
        folder: The output folder. It is created if it does not exist.
        model: The model's path or hub id, for the metadata.
        steps: The number of sampling steps.
        guidance_scale: The guidance scale in diffusers' convention.
        sampler: The scheduler's short name, from `sampler_name`.
        loras: Paths of the loaded LoRAs with their weights.

    Raises:
        UsageError: The folder cannot be created.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        steps: int,
        guidance_scale: float,
        sampler: str,
        loras: Sequence[tuple[str, float]] = (),
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UsageError(f"--output {folder} is a file; specify a folder") from error
        except OSError as error:
            raise UsageError(
                f"--output {folder} cannot be created ({error.strerror}); specify another folder"
            ) from error
        self.folder, self._written = folder, list[GeneratedImage]()
        self._model, self._steps, self._guidance, self._sampler = model, steps, f"{guidance_scale:g}", sampler
        numbers = (re.match(r"\d+(?=-)", path.name) for path in folder.glob("*.png"))
        self._next_number = max((int(number[0]) + 1 for number in numbers if number), default=0)
        self._loras = ", ".join(f"{lora}: {weight:g}" for lora, weight in loras)

    def write(self, images: Sequence[GeneratedImage]) -> list[Path]:
        """Write images, and return their paths."""
        paths = []
        for each in images:
            paths.append(self._new_path(f"{self._next_number:03d}-{_slug(each.prompt)}", each.seed))
            self._next_number += 1
            each.image.save(paths[-1], pnginfo=self._metadata(each))
        self._written += images
        return paths

    def write_grid(self) -> Path:
        """Write all images so far as one picture, and return its path."""
        images = self._written
        columns = math.ceil(math.sqrt(len(images)))
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        path = self._new_path("grid", images[0].seed)
        grid([[each.image for each in row] for row in rows]).save(path)
        return path

    def _new_path(self, name: str, seed: int) -> Path:
        """Return a path that does not exist: what is generated with which settings, and a number if there is such a file."""
        stem = f"{name}_{self._steps}-step{'s' * (self._steps > 1)}_cfg-{self._guidance}_seed-{seed}"
        paths = (self.folder / f"{stem}{f'_{n}' if n > 1 else ''}.png" for n in itertools.count(1))
        return next(path for path in paths if not path.exists())

    def _metadata(self, generated: GeneratedImage) -> PngInfo:
        image, prompt, seed, loras = generated.image, generated.prompt, generated.seed, self._loras
        # The line that A1111 and similar programs read from an image's "parameters".
        parameters = (
            f"Steps: {self._steps}, Sampler: {self._sampler}, CFG scale: {self._guidance}, Seed: {seed}, "
            f"Size: {image.width}x{image.height}, Model: {self._model}" + (f', Loras: "{loras}"' if loras else "")
        )
        values = {"prompt": prompt, "steps": self._steps, "sampler": self._sampler, "guidance_scale": self._guidance}
        values |= {"seed": seed, "model": self._model, **({"loras": loras} if loras else {})}
        metadata = PngInfo()
        metadata.add_itxt("parameters", f"{prompt}\n{parameters}")
        for key, value in values.items():
            metadata.add_itxt(key, str(value))
        return metadata


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """Return images in rows on a white background. Every image keeps its aspect ratio.

    Args:
        rows: The images, row by row. Not empty.
        columns: A heading for each column.
        labels: A label for each row, placed above it.
        cell: The long side of each image in pixels. By default the long side of the first image, doubled until it
            reaches MIN_GRID_SIDE.
    """
    side = cell or max(rows[0][0].size)
    while cell is None and side < MIN_GRID_SIDE:
        side *= 2
    thumbnails = [[_fit(image, side) for image in row] for row in rows]
    cell_width = max(image.width for row in thumbnails for image in row)
    heights = [max(image.height for image in row) for row in thumbnails]
    gap, font_size = max(4, side // 24), max(11, side // 9)
    font, line = ImageFont.load_default(size=font_size), round(font_size * 1.5)
    heading_height = line * (1 + max(text.count("\n") for text in columns)) if columns else 0
    label_height = line if labels else 0
    width = max(len(row) for row in rows) * (cell_width + gap) + gap
    height = heading_height + sum(heights) + len(rows) * (gap + label_height) + gap
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for j, text in enumerate(columns):
        center = gap + j * (cell_width + gap) + cell_width / 2
        pen.multiline_text((center, heading_height / 2), text, "black", font, "mm", align="center")
    top = heading_height + gap
    for i, row in enumerate(thumbnails):
        if labels:
            pen.text((gap, top + label_height / 2), labels[i], "#555555", font, "lm")
        for j, image in enumerate(row):
            left = gap + j * (cell_width + gap) + (cell_width - image.width) // 2
            canvas.paste(image, (left, top + label_height + (heights[i] - image.height) // 2))
        top += heights[i] + gap + label_height
    return canvas


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Return an image scaled so that its long side is `side`."""
    long_side = max(image.size)
    size = (max(1, round(image.width * side / long_side)), max(1, round(image.height * side / long_side)))
    resample = Image.Resampling.NEAREST if side % long_side == 0 else Image.Resampling.LANCZOS
    return image.resize(size, resample)
