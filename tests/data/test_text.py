"""Text that people wrote: byte order marks, UTF-16 and code pages, in captions, prompts and metadata."""

import codecs
import json
from pathlib import Path

import pytest

from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.text import TextEncodingError, decode_text, split_lines
from tests.support.data import captions, encoded, picture, reasons, write_tar

CAPTION = "a naïve cat, 猫"

UNDECODED = "text is not UTF-8, nor UTF-16 with a byte order mark"

ENCODED = {
    "utf-8": CAPTION.encode(),
    "utf-8-sig": CAPTION.encode("utf-8-sig"),
    "utf-16 little": codecs.BOM_UTF16_LE + CAPTION.encode("utf-16-le"),
    "utf-16 big": codecs.BOM_UTF16_BE + CAPTION.encode("utf-16-be"),
    "utf-16 unmarked": CAPTION.encode("utf-16-le"),
    "utf-16 big unmarked": CAPTION.encode("utf-16-be"),
    "utf-32": CAPTION.encode("utf-32"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_text_is_decoded_where_the_encoding_is_certain(tmp_path: Path, name: str) -> None:
    raw = ENCODED[name]
    assert decode_text(raw) == CAPTION
    (tmp_path / "folder").mkdir()
    for i, suffix in enumerate(("txt", "TXT", "caption", "text")):
        picture(i).save(tmp_path / "folder" / f"{i}.png")
        (tmp_path / "folder" / f"{i}.{suffix}").write_bytes(raw)
    assert captions(tmp_path / "folder") == [CAPTION] * 4
    files = [(f"{i}.{suffix}", raw) for i, suffix in enumerate(("txt", "TXT", "caption", "text"))]
    files += [(f"{i}.png", encoded(picture(i))) for i in range(4)]
    assert captions(write_tar(tmp_path / "a.tar", files)) == [CAPTION] * 4
    (tmp_path / "prompts.txt").write_bytes(raw)
    assert read_prompts(str(tmp_path / "prompts.txt")) == [CAPTION]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_metadata_of_any_encoding_are_decoded(tmp_path: Path, encoding: str) -> None:
    values = {"file_name": "a.png", "text": CAPTION}
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "csv").mkdir()
    (tmp_path / "jsonl" / "metadata.jsonl").write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding=encoding)
    (tmp_path / "csv" / "metadata.csv").write_text(f'file_name,text\r\na.png,"{CAPTION}"\r\n', encoding=encoding)
    for folder in ("jsonl", "csv"):
        picture().save(tmp_path / folder / "a.png")
        assert captions(tmp_path / folder) == [CAPTION]
    raw = json.dumps({"caption": CAPTION}, ensure_ascii=False).encode(encoding)
    assert captions(write_tar(tmp_path / "a.tar", [("a.png", encoded(picture())), ("a.json", raw)])) == [CAPTION]


@pytest.mark.parametrize(
    "raw",
    [
        "naïve".encode("cp1252"),
        "кот".encode("cp1251"),
        "кот".encode("utf-16-le"),
        "猫狗".encode("gbk"),
        "猫".encode("iso2022_jp"),
        b"a\0b",
        b"\xff\xfea",
    ],
)
def test_captions_of_other_encodings_are_counted(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(TextEncodingError):
        decode_text(raw)
    (tmp_path / "folder").mkdir()
    picture().save(tmp_path / "folder" / "a.png")
    (tmp_path / "folder" / "a.txt").write_bytes(raw)
    assert reasons(tmp_path / "folder") == {f"caption: {UNDECODED}": 1}
    shard = write_tar(tmp_path / "a.tar", [("a.png", encoded(picture())), ("a.txt", raw)])
    assert reasons(shard) == {f"caption: {UNDECODED}": 1}


def test_a_byte_order_mark_that_another_program_decoded_is_no_part_of_a_caption(tmp_path: Path) -> None:
    values = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(("a cat", "\ufeffa cat", "\ufeff"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, values)))
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    assert reasons(tmp_path) == {"kept": 2, "no caption": 1}


def test_the_line_that_cannot_be_decoded_is_named() -> None:
    for raw, line in ((b"a\nb\n\xe9", 3), (b"a\n\0b", 2), (b"\xff\xfea\0\n\0b", 2)):
        with pytest.raises(TextEncodingError) as caught:
            decode_text(raw)
        assert caught.value.line == line


def test_lines_end_at_line_feeds_and_carriage_returns_only() -> None:
    assert split_lines("a\u2028b\x85c\r\nd\re\n") == ["a\u2028b\x85c", "d", "e", ""]
