"""The one place that decodes images: which formats, how they lie, their depth and transparency, and what is refused."""

import io
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from lcmdistill.data.images import IMAGE_SUFFIXES, ImageError, open_image, supported_formats, unsupported_reason
from tests.support.data import encoded, picture, reasons, write_tar

KINDS = {"png": "PNG", "jfif": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "jp2": "JPEG2000"}
KINDS |= {"ppm": "PPM", "tga": "TGA", "qoi": "QOI", "mpo": "MPO"} | ({"avif": "AVIF"} if features.check("avif") else {})

RED, LIME, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def quadrants(*colors: tuple[int, int, int]) -> Image.Image:
    """An image of 32 x 48 with a color for each of its quarters: top left, top right, bottom left, bottom right."""
    pixels = np.array(colors, dtype=np.uint8).reshape(2, 2, 3)
    return Image.fromarray(pixels.repeat(24, 0).repeat(16, 1))


def assert_close(image: Image.Image, expected: Image.Image) -> None:
    assert (image.mode, image.size) == ("RGB", expected.size)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 20


def png(depth: int, color: int, pixel: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 4 x 2 equal pixels."""
    header = struct.pack(">IIBBBBB", 4, 2, depth, color, 0, 0, 0)
    every = [
        (b"IHDR", header),
        *chunks,
        (b"IDAT", zlib.compress((b"\0" + (pixel * 4)[: 2 if depth == 4 else None]) * 2)),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def qoi(image: Image.Image) -> bytes:
    """A QOI file of plain pixels; Pillow 11 reads the format and does not write it."""
    pixels = np.asarray(image).reshape(-1, 3)
    data = b"".join(b"\xfe" + pixel.tobytes() for pixel in pixels)
    return b"qoif" + struct.pack(">IIBB", *image.size, 3, 0) + data + b"\0" * 7 + b"\x01"


@pytest.mark.parametrize("suffix", KINDS)
def test_images_of_each_format_are_read_from_folders_and_shards(tmp_path: Path, suffix: str) -> None:
    image = quadrants(RED, LIME, BLUE, BLACK)
    raw = qoi(image) if suffix == "qoi" else encoded(image, KINDS[suffix])
    assert_close(open_image(raw), quadrants(RED, LIME, BLUE, BLACK))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (f"a.{suffix}", f"B.{suffix.upper()}"):
        (folder / name).write_bytes(raw)
        (folder / name).with_suffix(".txt").write_text("a caption")
    assert reasons(folder) == {"kept": 2}
    assert reasons(write_tar(tmp_path / "a.tar", [(f"a.{suffix}", raw), ("a.txt", b"a")])) == {"kept": 1}


@pytest.mark.parametrize("suffix", ["heic", "jxl", "svg", "psd", "cr2", "pcx"])
def test_images_of_other_formats_are_counted(tmp_path: Path, suffix: str) -> None:
    assert f".{suffix}" in IMAGE_SUFFIXES
    if unsupported_reason(f".{suffix}") is None:
        pytest.skip("a plugin of Pillow reads it here")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"a.{suffix}").write_bytes(bytes(40))
    (folder / "a.txt").write_text("a")
    expected = {f"image format not supported (.{suffix})": 1}
    assert reasons(folder) == expected
    assert reasons(write_tar(tmp_path / "a.tar", [(f"a.{suffix}", bytes(40)), ("a.txt", b"a")])) == expected


def test_every_supported_format_is_one_that_runs_no_program() -> None:
    assert {"PNG", "JPEG", "WEBP"} <= set(supported_formats())
    assert not {"EPS", "WMF", "PDF", "GBR", "IM"} & set(supported_formats())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if "avif" in KINDS else [])])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_set_upright_by_the_tag_once(kind: str, orientation: int) -> None:
    colors = (RED, LIME, BLUE, BLACK)
    upright = {2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1), 5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0)}
    order = (upright | {8: (1, 3, 0, 2)}).get(orientation, range(4))
    expected = quadrants(*(colors[i] for i in order))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_image(encoded(quadrants(*colors), kind, exif=exif))
    assert_close(
        found, expected.resize((48, 32), Image.Resampling.NEAREST) if orientation in (5, 6, 7, 8) else expected
    )


def test_the_orientation_is_read_where_the_exif_block_cannot_be_written_again() -> None:
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    tiff += struct.pack("<HHII", 0x11A, 10, 1, 38) + struct.pack("<I", 0) + struct.pack("<ii", -1, 0)
    plain, block = encoded(quadrants(RED, LIME, BLUE, BLACK), "JPEG"), b"Exif\0\0" + tiff
    raw = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    with Image.open(io.BytesIO(raw)) as image, pytest.raises((ValueError, TypeError, struct.error, ZeroDivisionError)):
        image.getexif().tobytes()
    assert open_image(raw).size == (48, 32)
    assert open_image(raw.replace(tiff[8:], b"\xff" * len(tiff[8:]))).size == (32, 48)  # a block of rubbish has none


DEEP = struct.pack(">H", 20000)


@pytest.mark.parametrize(
    ("raw", "color"),
    [
        (png(16, 0, DEEP), (77, 77, 77)),
        (png(16, 2, DEEP + b"\0\0\xff\xff"), (78, 0, 255)),
        (png(16, 6, DEEP + b"\0\0\xff\xff" + b"\0\0"), (255, 255, 255)),
        (png(16, 4, DEEP + b"\xff\xff"), (78, 78, 78)),
        (png(16, 4, DEEP + b"\0\0"), (255, 255, 255)),
        (png(16, 0, DEEP, (b"tRNS", DEEP)), (255, 255, 255)),
        (png(8, 0, b"\x20", (b"tRNS", b"\0\x20")), (255, 255, 255)),
        (png(8, 0, b"\x20", (b"tRNS", b"\0\x21")), (32, 32, 32)),
        (png(16, 2, DEEP * 3, (b"tRNS", DEEP * 3)), (255, 255, 255)),
        (png(16, 2, DEEP * 3, (b"tRNS", b"\0\x4e" * 3)), (78, 78, 78)),
        (png(4, 0, b"\x55", (b"tRNS", b"\0\x05")), (255, 255, 255)),
        (png(4, 0, b"\x55", (b"tRNS", b"\0\x55")), (85, 85, 85)),
        (png(8, 6, b"\0\0\0\0"), (255, 255, 255)),
        (png(8, 6, b"\0\0\0\x80"), (127, 127, 127)),
        (b"P5 2 2 65535\n" + DEEP * 4, (77, 77, 77)),
        (encoded(Image.fromarray(np.full((2, 2), 20000, np.uint16)), "TIFF"), (77, 77, 77)),
        (encoded(Image.new("LA", (2, 2), (0, 0)), "TIFF"), (255, 255, 255)),
        (encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), RED),
    ],
)
def test_sixteen_bits_are_scaled_and_transparency_is_white(raw: bytes, color: tuple[int, int, int]) -> None:
    assert open_image(raw).getpixel((0, 0)) == color


@pytest.mark.parametrize("orientation", [1, 3])
@pytest.mark.parametrize(
    ("bits", "photometric", "data", "grays"),
    [
        (16, 1, b"\0\0\xff\xff", [0, 255]),
        (16, 0, b"\0\0\xff\xff", [255, 0]),
        (12, 1, b"\x00\x0f\xff", [0, 255]),
        (8, 0, b"\0\xff", [255, 0]),
        (32, 1, b"\0\0\0\0\xff\xff\xff\xff", None),
    ],
)
def test_gray_tiffs_of_many_bits_have_their_brightness(
    bits: int, photometric: int, data: bytes, grays: list[int] | None, orientation: int
) -> None:
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 122, 274: orientation, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    raw = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
    if grays is None:
        with pytest.raises(ImageError, match="32-bit integer pixels"):
            open_image(raw)
        return
    assert np.asarray(open_image(raw))[0, :, 0].tolist() == grays[:: -1 if orientation == 3 else 1]


def test_signed_pixels_are_refused() -> None:
    raw = encoded(Image.new("L", (2, 2)), "TIFF", tiffinfo={339: 2})
    with pytest.raises(ImageError, match="signed integer pixels"):
        open_image(raw)


def test_the_background_shows_through() -> None:
    assert open_image(png(8, 6, b"\0\0\0\0"), background="black").getpixel((0, 0)) == BLACK


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def test_postscript_of_any_name_reaches_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "check_call", "check_output", "run", "call"):
        monkeypatch.setattr(subprocess, name, forbidden)
    for suffix in ("png", "jpg", "eps"):
        (tmp_path / f"{suffix}.{suffix}").write_bytes(POSTSCRIPT)
        (tmp_path / f"{suffix}.txt").write_text("a")
    unsupported = "image format not supported"
    assert reasons(tmp_path) == {f"{unsupported} (PostScript)": 2, f"{unsupported} (.eps)": 1}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"%PDF-1.7", "image format not supported (PDF)"),
        (b"8BPS\0\1", "image format not supported (PSD)"),
        (b"<svg/>", "image format not supported (SVG)"),
        (encoded(Image.new("I", (2, 2)), "TIFF"), "image format not supported (32-bit integer pixels)"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "image format not supported (floating-point pixels)"),
        (b"P5 0 5 255\n", "corrupt image"),
        (b"", "corrupt image"),
        (encoded(picture(), "AVIF")[:200] if "avif" in KINDS else b"", "corrupt image"),
        (b"P6 20000 20000 255\n", "image too large"),
    ],
)
def test_other_bytes_are_refused_with_a_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(raw)
    assert str(caught.value) == reason
