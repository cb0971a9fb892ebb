"""Image files: embedded settings, and grids that keep every image's aspect ratio."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcmdistill.sampling.png import GeneratedImage, ImageFolder, grid


def test_the_settings_are_in_the_metadata(tmp_path: Path) -> None:
    prompt = "a “caf\u00e9”, 東京"
    image = GeneratedImage(Image.new("RGB", (16, 16), "red"), prompt, 7)
    settings: dict[str, Any] = {"model": "runs/x/pipeline", "steps": 4, "guidance_scale": 4.5, "sampler": "LCM"}
    (path,) = ImageFolder(tmp_path, **settings).write([image])
    assert path.name == "000-a-caf_4-steps_cfg-4.5_seed-7.png"
    text = getattr(Image.open(path), "text")  # noqa: B009
    expected = {key: str(value) for key, value in settings.items()} | {"prompt": prompt, "seed": "7"}
    line = "Steps: 4, Sampler: LCM, CFG scale: 4.5, Seed: 7, Size: 16x16, Model: runs/x/pipeline"
    assert text == {**expected, "parameters": f"{prompt}\n{line}"}
    loras = [("lcm.safetensors", 1.0), ("style", 0.5)]
    (path,) = ImageFolder(tmp_path, **settings, loras=loras).write([image])
    assert path.name == "001-a-caf_4-steps_cfg-4.5_seed-7.png"  # nothing is overwritten
    text = getattr(Image.open(path), "text")  # noqa: B009
    assert text["loras"] == "lcm.safetensors: 1, style: 0.5"
    assert text["parameters"].endswith(', Loras: "lcm.safetensors: 1, style: 0.5"')


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3)])
def test_all_images_are_in_the_grid(tmp_path: Path, count: int, columns: int) -> None:
    images = [GeneratedImage(Image.new("RGB", (128, 128), (10 * i, 0, 0)), "a", i) for i in range(count)]
    folder = ImageFolder(tmp_path, model="m", steps=1, guidance_scale=1.0, sampler="LCM")
    folder.write(images)
    path = folder.write_grid()
    assert path.name == "grid_1-step_cfg-1_seed-0.png"
    image = Image.open(path)
    colors = {color for _, color in image.getcolors() or []}
    assert colors == {*((10 * i, 0, 0) for i in range(count)), (255, 255, 255)}
    assert columns * 128 < image.width < columns * 140
    assert len(list(tmp_path.iterdir())) == count + 1


def test_a_grid_has_headings_and_labels_and_small_images_are_enlarged() -> None:
    cell = Image.new("RGB", (16, 16), "red")
    plain = grid([[cell, cell]])
    labelled = grid([[cell, cell]], columns=["1 step", "2 steps\nmore"], labels=["a prompt"])
    assert plain.size[0] == labelled.size[0] >= 2 * 96
    assert labelled.size[1] > plain.size[1]


def test_a_grid_keeps_the_aspect_ratio() -> None:
    wide, high = Image.new("RGB", (128, 64), "red"), Image.new("RGB", (64, 128), "blue")
    image = grid([[wide, wide], [high, wide]])
    red = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == (255, 0, 0)]
    blue = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == (0, 0, 255)]
    assert len(red) == 3 * 128 * 64
    assert len(blue) == 64 * 128
    assert max(x for x, _ in blue) - min(x for x, _ in blue) == 63
    assert max(y for _, y in blue) - min(y for _, y in blue) == 127
    square = grid([[Image.new("RGB", (16, 16), "red")]])
    assert square.size == (128 + 2 * 5, 128 + 2 * 5)  # 16 px are doubled until they reach 96
