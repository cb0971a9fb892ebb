"""Data: what each source yields, what is kept and why the rest is not, the transforms, the cache, and the order."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.base import Member
from lcmdistill.data.transforms import Rejected, Sample, check_sample
from tests.support.data import encoded, picture, pixels


def test_a_square_image_of_the_right_size_is_left_as_it_is() -> None:
    image = picture(size=(16, 16))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    found = pixels(image)
    assert (found.dtype, found.shape) == (torch.float32, (3, 16, 16))
    assert torch.equal(found, expected)
    assert (found.min() >= -1, found.max() <= 1) == (True, True)


def stripes(width: int, height: int) -> Image.Image:
    """Every column of one grey, from black on the left to white on the right."""
    row = np.linspace(0, 255, width).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


def test_the_shorter_side_fills_the_square_and_the_centre_is_kept() -> None:
    found = pixels(stripes(96, 32), resolution=16)
    assert found.shape == (3, 16, 16)
    row = (found[0, 8] + 1) / 2
    # the middle third of the stripes
    assert row[0].item() == pytest.approx(1 / 3 + 1 / 96, abs=0.02)
    assert row[-1].item() == pytest.approx(2 / 3 - 1 / 96, abs=0.02)
    assert torch.equal(pixels(stripes(96, 32).transpose(Image.Transpose.TRANSPOSE)), found.transpose(1, 2))


def test_a_random_crop_moves_with_the_place_and_the_seed_alone() -> None:
    image = stripes(96, 32)
    lefts = {round(pixels(image, crop="random", place=place)[0, 0, 0].item(), 4) for place in range(20)}
    assert len(lefts) > 10
    assert torch.equal(pixels(image, crop="random", place=3), pixels(image, crop="random", place=3))
    assert len({round(pixels(image, place=place)[0, 0, 0].item(), 4) for place in range(20)}) == 1


def test_flipping_mirrors_half_of_the_images() -> None:
    image = stripes(16, 16)
    straight, mirrored = pixels(image), pixels(image).flip(2)
    found = [pixels(image, flip=True, place=place) for place in range(60)]
    flips = sum(torch.equal(each, mirrored) for each in found)
    assert 15 < flips < 45
    assert flips + sum(torch.equal(each, straight) for each in found) == 60


def test_an_image_lies_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = stripes(16, 16)
    turned = pixels(encoded(image, exif=exif))
    assert torch.equal(turned, pixels(image.transpose(Image.Transpose.ROTATE_270)))


def test_transparency_is_composed_on_white() -> None:
    image = picture(size=(16, 16)).convert("RGBA")
    alpha = np.zeros((16, 16), dtype=np.uint8)
    alpha[:, 8:] = 255
    image.putalpha(Image.fromarray(alpha))
    found = pixels(image)
    assert bool((found[:, :, :8] == 1).all())
    assert torch.equal(found[:, :, 8:], pixels(picture(size=(16, 16)))[:, :, 8:])


def test_a_palette_with_a_transparent_colour_is_composed_on_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (8, 0, 16, 16))
    assert pixels(image)[:, 0, 0].tolist() == [1, -1, -1]
    found = pixels(encoded(image, transparency=0))
    assert found[:, 0, 0].tolist() == [1, 1, 1]
    assert found[:, 0, 12].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    found = pixels(encoded(stripes(16, 16).convert(mode), kind))
    assert (found[:, 8, 1].mean().item() < -0.5, found[:, 8, 14].mean().item() > 0.5) == (True, True)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = (np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).astype(np.uint16)
    expected = torch.arange(256).view(16, 16).float() / 127.5 - 1
    assert torch.equal(pixels(encoded(Image.fromarray(ramp)))[0], expected)


def test_a_sliver_does_not_fill_the_memory() -> None:
    assert pixels(Image.new("RGB", (60000, 1), "red"), resolution=512).shape == (3, 512, 512)


def test_small_images_are_skipped_on_request() -> None:
    member = Member("a", encoded(picture(size=(40, 20))), "a caption")
    assert isinstance(check_sample(member, DataConfig(resolution=16, min_size=20), 0, 0), Sample)
    assert check_sample(member, DataConfig(resolution=16, min_size=21), 0, 0) == Rejected("smaller than 21 px")


@pytest.mark.parametrize(
    ("meta", "kept"),
    [({}, True), ({"pwatermark": 0.4}, True), ({"pwatermark": 0.6}, False), ({"pwatermark": None}, True)],
)
def test_watermarks_are_skipped_on_request_and_what_does_not_say_passes(meta: dict[str, Any], kept: bool) -> None:
    member = Member("a", encoded(picture()), "a caption", meta)
    assert isinstance(check_sample(member, DataConfig(resolution=16, max_watermark=0.5), 0, 0), Sample) == kept
    assert isinstance(check_sample(member, DataConfig(resolution=16), 0, 0), Sample)


def test_white_space_in_a_caption_is_joined() -> None:
    assert check_sample(Member("a", None, " a\n cat \t"), DataConfig(), 0, 0) == Sample(
        "a cat", None, (512, 512, 0, 0, 512, 512)
    )
