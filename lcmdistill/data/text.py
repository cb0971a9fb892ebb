"""Decode text files that people wrote: captions, prompts, JSON and CSV."""

import codecs
import re

_BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


_NOT_IN_TEXT = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f]|\x1b[$(]")
"""Control characters that no text holds.

Cyrillic UTF-16 without a mark is valid UTF-8 with one per letter. ISO 2022 is ASCII whose escapes choose the characters."""

NOT_TEXT = "text is not UTF-8, nor UTF-16 with a byte order mark"


class TextEncodingError(ValueError):
    """Text whose encoding is unknown. The message is a short reason; `line` is the line where decoding failed."""

    def __init__(self, line: int) -> None:
        super().__init__(NOT_TEXT)
        self.line = line


def decode_text(raw: bytes) -> str:
    """Return the text of `raw`, without a byte order mark.

    A byte order mark decides the encoding. Without one the text must be UTF-8, or UTF-16 whose zero bytes show the byte
    order. Code pages are never guessed: their bytes fit several of them, and a wrong guess would train on garbled captions.

    Raises:
        TextEncodingError: If the encoding is unknown.
    """
    encoding = _encoding(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextEncodingError(raw.count(b"\n", 0, error.start) + 1) from error
    if control := _NOT_IN_TEXT.search(text):
        raise TextEncodingError(text.count("\n", 0, control.start()) + 1)
    return text


def decode_table(raw: bytes) -> str:
    """Return the text of a file with a sample per line, as `decode_text` does, but without giving up for a single line.

    Bytes that are not UTF-8 become lone surrogates. `is_decoded` finds the lines that hold some.

    Raises:
        TextEncodingError: If the encoding of the whole file is unknown.
    """
    encoding = _encoding(raw)
    return raw.decode(encoding, "surrogateescape") if encoding.startswith("utf-8") else decode_text(raw)


def is_decoded(text: str) -> bool:
    """Return whether a part of what `decode_table` returned is text."""
    return not _NOT_IN_TEXT.search(text) and not any("\udc80" <= character <= "\udcff" for character in text)


def _encoding(raw: bytes) -> str:
    mark = next((name for mark, name in _BYTE_ORDER_MARKS if raw.startswith(mark)), None)
    return mark or _utf16_byte_order(raw) or "utf-8"


def _utf16_byte_order(raw: bytes) -> str | None:
    """Return "utf-16-le" or "utf-16-be" for text of mostly Latin letters without a mark, otherwise None."""
    if len(raw) % 2 or b"\0" not in raw:
        return None
    half = len(raw) // 2
    even_zeros, odd_zeros = raw[0::2].count(0), raw[1::2].count(0)
    if not even_zeros and odd_zeros > half / 2:
        return "utf-16-le"
    return "utf-16-be" if not odd_zeros and even_zeros > half / 2 else None


def split_lines(text: str) -> list[str]:
    """Split at line feeds and carriage returns only: captions may hold the other characters that `splitlines` splits at."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
