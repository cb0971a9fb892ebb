"""Image folders: layouts of metadata, damaged rows, linked sub-folders, odd names, and what is left over."""

import json
import os
from pathlib import Path

import pytest

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.registry import make_source
from lcmdistill.utils.errors import UsageError
from tests.support.data import captions, picture, reasons, surveyed

NO_ROW = "image without a row in the metadata file"

NOT_TEXT = "text is not UTF-8, nor UTF-16 with a byte order mark"


def fill(folder: Path, count: int, caption: str | None = None) -> Path:
    """Write images 0.png and so on, with captions on request."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)
    return folder


def row(name: str, text: str | None = "a") -> str:
    return json.dumps({"file_name": name, "text": text})


def jsonl(folder: Path, *lines: str) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_metadata_files_of_subfolders_are_read(tmp_path: Path) -> None:
    jsonl(fill(tmp_path / "train", 2), row("0.png", "b"), row("1.png", "c"))
    (fill(tmp_path / "val" / "deep", 1) / "metadata.csv").write_text("file_name,text\n0.png,d\n")
    fill(tmp_path / "plain", 1, "e")
    assert captions(tmp_path) == ["b", "c", "d", "e"]
    assert reasons(tmp_path) == {"kept": 4}


def test_metadata_of_the_root_describe_subfolders_once(tmp_path: Path) -> None:
    jsonl(fill(tmp_path / "train", 2), row("./0.png", "own"), row("1.png", "own"))
    jsonl(tmp_path, row("train/0.png", "root"))
    assert captions(tmp_path) == ["root", "own"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'a': 1}", "metadata.jsonl, line 2: not valid JSON"),
        ("[" * 100_000, "metadata.jsonl, line 2: not valid JSON"),
        ('{"n": ' + "1" * 5000 + "}", "metadata.jsonl, line 2: not valid JSON"),
        ("[1]", 'metadata.jsonl, line 2: not a JSON object such as {"file_name": "a.png", "text": "a cat"}'),
        ('{"text": "caf\xe9"}', f"metadata.jsonl, line 2: {NOT_TEXT}"),
    ],
)
def test_one_damaged_line_is_counted_and_named(tmp_path: Path, line: str, reason: str) -> None:
    fill(tmp_path, 3)
    raw = "\n".join([row("0.png"), line, row("2.png")])
    (tmp_path / "metadata.jsonl").write_bytes(raw.encode("latin-1"))
    assert reasons(tmp_path) == {"kept": 2, reason: 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1.png,caf\xe9", f"metadata.csv, line 3: {NOT_TEXT}"),
        ("1.png,b\0", f"metadata.csv, line 3: {NOT_TEXT}"),
        (
            "1.png,b, c",
            "metadata.csv, line 3: more than the 2 fields of the header; put text that holds commas in quotes",
        ),
        ('1.png,"b "x" c"', "metadata.csv, line 3: not valid CSV (',' expected after '\"')"),
        ("1.png," + "b" * 200_000, "metadata.csv, line 3: not valid CSV (field larger than field limit (131072))"),
        ("1.png", "no caption"),
    ],
)
def test_one_damaged_row_of_a_table_is_counted_and_named(tmp_path: Path, line: str, reason: str) -> None:
    fill(tmp_path, 3)
    raw = "\r\n".join(["file_name,text", "0.png,a", line, "", '2.png,"a, ""b"",\r\nc",', ""])
    (tmp_path / "metadata.csv").write_bytes(raw.encode("latin-1"))
    assert reasons(tmp_path) == {"kept": 2, reason: 1}


def test_damaged_lines_of_one_kind_share_a_reason(tmp_path: Path) -> None:
    jsonl(fill(tmp_path, 1), "{", *["}"] * 4, row("0.png"))
    assert reasons(tmp_path) == {"kept": 1, "metadata.jsonl, lines 1, 2, 3 and 2 more: not valid JSON": 5}
    jsonl(tmp_path, "[", "]")
    with pytest.raises(UsageError, match=r"none of 2 samples .* \(2 x metadata\.jsonl, lines 1, 2: not valid JSON\)"):
        surveyed(DataConfig(sources=(str(tmp_path),), resolution=16), seconds=9)


def test_a_quote_that_is_never_closed_swallows_nothing_in_silence(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,a\n1.png,"b\n2.png,c\n3.png,d\n')
    reason = "metadata.csv, line 3: not valid CSV (unexpected end of data)"
    assert reasons(tmp_path) == {"kept": 1, reason: 1, NO_ROW: 2}


def test_names_that_no_file_can_have_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    names = ["x" * 300 + ".png", "a\0.png", "\ud83d.png", "y/" * 3000 + "a.png", "", "0.png"]
    jsonl(tmp_path, *map(row, names), '{"file_name": 7, "text": "a"}', '{"file_name": ["0.png"], "text": "a"}')
    found = reasons(tmp_path)
    assert found.pop("kept") == 1
    assert set(found) <= {"image file missing", "unreadable file (OSError)"}
    assert found.total() == 7
    json.dumps(make_source(str(tmp_path)).fingerprint())


def test_captions_that_are_no_text_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    lines = [row("0.png", None), '{"file_name": "1.png", "text": null, "caption": "a"}', '{"file_name": "2.png"}']
    jsonl(tmp_path, *lines, row("3.png", "half an emoji \ud83d"))
    assert reasons(tmp_path) == {"kept": 1, "no caption": 2, "caption is not valid Unicode": 1}


def test_what_is_left_over_is_counted(tmp_path: Path) -> None:
    """Images that were forgotten in the metadata, and captions whose image is gone."""
    jsonl(fill(tmp_path / "rows", 3), row("0.png"))
    (fill(tmp_path / "plain", 2, "a") / "0.png").unlink()
    assert reasons(tmp_path) == {"kept": 2, NO_ROW: 2, "no image": 1}
    source = make_source(str(tmp_path), seed=0)
    assert source.count() == 5
    before = source.fingerprint()
    (tmp_path / "plain" / "notes.txt").write_text("not a caption")
    assert make_source(str(tmp_path), seed=0).fingerprint() == before


def test_linked_subfolders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    data, other = fill(tmp_path / "data", 1, "a"), fill(tmp_path / "other", 2, "b")
    (data / "linked").symlink_to(other)
    (data / "again").symlink_to(other)
    (data / "self").symlink_to(data)
    (other / "back").symlink_to(data)
    (data / "dead").symlink_to("nowhere")
    assert captions(data) == ["a", "b", "b"]
    assert [member.key for member in make_source(str(data)).members()] == ["0.png", "again/0.png", "again/1.png"]
    (tmp_path / "root").symlink_to(data)
    assert captions(tmp_path / "root") == ["a", "b", "b"]


def test_files_that_are_none_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, 1, "a")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to("nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "folder.png").mkdir()
    assert reasons(tmp_path) == {"kept": 1, "image file missing": 3}


def test_folders_that_cannot_be_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 1, "a")
    fill(tmp_path / "closed", 1, "a")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert reasons(tmp_path) == {"kept": 1, "unreadable folder": 1}


def test_metadata_in_capitals_are_read(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    jsonl(tmp_path, row("0.png"), row("1.png"))
    (tmp_path / "metadata.jsonl").rename(tmp_path / "Metadata.JSONL")
    assert reasons(tmp_path) == {"kept": 2}


def test_a_caption_that_gets_another_image_is_in_the_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    for caption in tmp_path.glob("*.txt"):
        caption.unlink()
    (tmp_path / "0.txt").write_text("a cat")
    before = make_source(str(tmp_path)).fingerprint()
    (tmp_path / "0.txt").rename(tmp_path / "1.txt")
    assert make_source(str(tmp_path)).fingerprint() != before


def test_a_run_in_the_folder_is_no_data(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    before = make_source(str(tmp_path)).fingerprint()
    fill(tmp_path / "out" / "samples", 1)
    (tmp_path / "out" / ".data.json").touch()
    assert make_source(str(tmp_path)).fingerprint() == before


def test_images_outside_the_folder_are_in_the_fingerprint(tmp_path: Path) -> None:
    outside = fill(tmp_path / "images", 2)
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data", row("../images/0.png"), row(str(outside / "1.png")))
    assert reasons(tmp_path / "data") == {"kept": 2}
    seen = [make_source(str(tmp_path / "data")).fingerprint()]
    for i in range(2):
        picture(i + 5, (24, 24)).save(outside / f"{i}.png")
        seen.append(make_source(str(tmp_path / "data")).fingerprint())
    (outside / "1.png").unlink()
    seen.append(make_source(str(tmp_path / "data")).fingerprint())
    assert all(seen[i] != seen[j] for i in range(4) for j in range(i))


def test_the_spelling_of_a_folder_is_not_in_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "x", 2, "a")
    (tmp_path / "link").symlink_to("x")
    monkeypatch.chdir(tmp_path)
    words = ["x", "x/", "./x", "x/../x", f"{tmp_path}/x", f"{tmp_path}/x/", "link"]
    assert [make_source(word).fingerprint() for word in words] == [make_source("x").fingerprint()] * len(words)
    (tmp_path / "x").rename(tmp_path / "y")
    assert make_source("y").fingerprint() == make_source("./y").fingerprint()


def test_files_of_any_size_are_not_read_into_memory(tmp_path: Path) -> None:
    fill(tmp_path, 3, "a")
    first, second = sorted(path for path in tmp_path.iterdir() if path.suffix != ".txt")[:2]
    for path in (first, second.with_suffix(".txt")):
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # sparse: it takes no room on the disk
    assert reasons(tmp_path) == {"kept": 1, "file of more than 512 MiB: not read": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders")
def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    fill(tmp_path, 2, "a")
    (tmp_path / "0.txt").unlink()
    os.mkfifo(tmp_path / "0.txt")
    assert reasons(tmp_path) == {"kept": 1, "caption is not a file": 1}
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(UsageError, match=r"metadata\.jsonl is not a file"):
        reasons(tmp_path)


def test_a_caption_of_megabytes_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path, 2, "word " * 2000)
    (tmp_path / "1.txt").write_text("word " * 1_000_000)
    assert reasons(tmp_path) == {"kept": 1, "caption longer than 20,000 characters": 1}
