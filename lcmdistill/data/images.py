"""Open image files: the one place that decodes pixels that somebody else wrote."""

import contextlib
import io
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "QOI": (".qoi",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
}
"""Pillow's formats that are decoded, and their suffixes; where a sample has several images, the first format is used.

Pillow hands some other formats to programs outside, such as PostScript to Ghostscript, so the list is closed."""

_PLUGINS = {"HEIF": ("pillow_heif", "register_heif_opener"), "JXL": ("pillow_jxl", None)}
"formats that Pillow reads once a package is imported, and the function of it that registers them"

_NEVER_READ = (
    "psd psb xcf svg eps ps wmf emf exr hdr pfm fits ico cur icns dds pcx sgi rgb rgba bw ras xbm xpm bpg "
    "dng cr2 cr3 nef nrw arw sr2 orf rw2 raf pef"
)
"suffixes of other image formats"

IMAGE_SUFFIXES = (
    *(suffix for each in _FORMATS.values() for suffix in each),
    *(f".{name}" for name in _NEVER_READ.split()),
)
"every suffix that is taken for an image, decodable here or not, in lower case"

_SIGNATURES = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"<svg", "SVG"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL ", "JXL"),
)
"first bytes of formats that are not decoded, whatever the file's name"

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"tags of TIFF"

_WHITE_IS_ZERO, _SIGNED = 0, 2

_PNG_DEPTH = 24
"where a PNG has its bits per channel"

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"value of the EXIF orientation tag -> what sets the image upright"


class ImageError(ValueError):
    """An image that cannot be used. The message is a short reason, such as "corrupt image"."""


@cache
def supported_formats() -> tuple[str, ...]:
    """Return the formats of `_FORMATS` that this installation of Pillow decodes."""
    for module, register in _PLUGINS.values():
        with contextlib.suppress(ImportError):
            plugin = import_module(module)
            if register:
                getattr(plugin, register)()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def unsupported_reason(suffix: str) -> str | None:
    """Return why images of a suffix are not decoded here, None if they are."""
    if any(suffix in _FORMATS[name] for name in supported_formats()):
        return None
    return f"image format not supported ({suffix})"


def open_image(source: bytes | Path, background: str = "white") -> Image.Image:
    """Decode an image to 8-bit RGB, upright by its EXIF orientation.

    Args:
        source: The encoded image, or the path of its file.
        background: The color that shows through where the image is transparent.

    Returns:
        The image in mode "RGB".

    Raises:
        ImageError: If the image is corrupt, too large, or of a format that is not decoded here.
        OSError: If the file cannot be read.
    """
    raw = source.read_bytes() if isinstance(source, Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken EXIF blocks, which do not matter here
            image = Image.open(io.BytesIO(raw), formats=supported_formats())
            image.load()
            if image.format == "PNG":
                _scale_clear_color(image, raw[_PNG_DEPTH])
            return _upright(_to_rgb(image, background), image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("image too large") from error
    except UnidentifiedImageError as error:
        name = _unsupported_format(raw)
        raise ImageError(f"image format not supported ({name})" if name else "corrupt image") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their own code trips over
        raise ImageError("corrupt image") from error


def _unsupported_format(raw: bytes) -> str | None:
    """Return the name of a known format that is not decoded here, by its first bytes."""
    name = next((name for start, name in _SIGNATURES if raw.startswith(start)), None)
    if raw[4:8] == b"ftyp" and raw[8:12] in _HEIF_BRANDS:
        name = "AVIF" if raw[8:11] == b"avi" else "HEIF"
    return None if name in supported_formats() else name


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Return an image's pixels turned by its EXIF orientation.

    Only this tag is read. `ImageOps.exif_transpose` would also write the EXIF block again, which fails for blocks that
    Pillow reads but cannot write.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # an EXIF block that cannot be parsed has no orientation
        return pixels
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return pixels if method is None else pixels.transpose(method)


def _scale_clear_color(image: Image.Image, depth: int) -> None:
    """Bring the color that a PNG declares transparent to the 8 bits of the pixels: Pillow leaves it in the file's depth."""
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int) and depth < 8:
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    if image.mode == "RGB" and isinstance(clear, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Scale 16 bits to 8, and compose transparency on a background."""
    if image.mode == "F":
        raise ImageError("image format not supported (floating-point pixels)")
    if image.mode == "I" and image.format == "TIFF":
        raise ImageError("image format not supported (32-bit integer pixels)")
    tags = getattr(image, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):  # Pillow takes -1 for 255
        raise ImageError("image format not supported (signed integer pixels)")
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip to white
        deep, clear = np.asarray(image), image.info.get("transparency")
        # Pillow leaves a TIFF of 12 bits, and an inverted one, as it is.
        if tags.get(_BITS_PER_SAMPLE) == (12,):
            deep = deep.astype(np.uint32) * 65535 // 4095
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            deep = 65535 - deep
        image = Image.fromarray((deep // 257).clip(0, 255).astype(np.uint8))
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")
