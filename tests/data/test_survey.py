"""Data: what each source yields, what is kept and why the rest is not, the transforms, the cache, and the order."""

import json
import random
import time
from pathlib import Path

import pytest
from PIL import Image

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.base import Member
from lcmdistill.data.transforms import Rejected, Sample, check_sample
from lcmdistill.utils.errors import UsageError
from tests.support.data import captions, encoded, good, picture, reasons, surveyed, write_tar


def test_bad_members_of_a_shard_are_counted_with_their_reasons(tmp_path: Path) -> None:
    png, jpeg = encoded(picture()), encoded(picture(size=(64, 64)), "JPEG")
    bad = [
        *[("corrupt.png", b"no image at all"), ("corrupt.txt", b"a")],
        *[("truncated.jpg", jpeg[: len(jpeg) // 2]), ("truncated.txt", b"a")],
        *[("cut.png", png[: len(png) // 2]), ("cut.txt", b"a")],
        *[("empty.png", b""), ("empty.txt", b"a")],
        *[("nocaption.png", png)],
        *[("blank.png", png), ("blank.txt", b" \n")],
        *[("badjson.png", png), ("badjson.json", b"{")],
        *[("noimage.txt", b"a")],
    ]
    path = write_tar(tmp_path / "a.tar", good(range(3)) + bad + good(range(3, 5)))
    assert reasons(path) == {"kept": 5, "corrupt image": 4, "no caption": 2, "unreadable JSON": 1, "no image": 1}


def test_bad_files_of_a_folder_are_counted_with_their_reasons(tmp_path: Path) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"rubbish")
    rows = [{"file_name": f"{i}.png", "text": "a"} for i in (0, 3, 4)]
    rows += [{"file_name": "1.png"}, {"file_name": "1.png", "text": 7}, {"text": "a"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = {"kept": 1, "corrupt image": 1, "image file missing": 2, "no caption": 2}
    assert reasons(tmp_path) == {**expected, "image without a row in the metadata file": 1}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_truncated_shard_gives_what_it_has_and_the_next_one_is_read(tmp_path: Path, name: str) -> None:
    whole = write_tar(tmp_path / name, good(range(20))).read_bytes()
    # An uncompressed shard is cut in a picture: at the border of a member nothing could be noticed.
    cut = len(whole) // 2 if name.endswith("gz") else whole.index(encoded(picture(10))) + 600
    (tmp_path / name).write_bytes(whole[:cut])
    write_tar(tmp_path / "b.tar", good(range(100, 103)))
    found = reasons(tmp_path)
    unreadable = [reason for reason in found if reason.startswith(("unreadable part of a shard", "shard ends early"))]
    assert 3 < found["kept"] < 20
    assert 1 <= sum(found[reason] for reason in unreadable) <= 2  # of the member that is cut, and of the rest
    assert captions(tmp_path)[-3:] == ["picture 100", "picture 101", "picture 102"]


def test_a_shard_that_is_no_tar_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"this is no tar" * 100)
    write_tar(tmp_path / "b.tar", good(range(2)))
    found = reasons(tmp_path)
    assert found.pop("kept") == 2
    assert list(found.values()) == [1]


def test_rubbish_is_rejected_whatever_its_decoder_makes_of_it() -> None:
    draw, config = random.Random(0), DataConfig(resolution=16)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        sound = encoded(picture(), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        for _ in range(100):
            broken = bytearray(sound)
            for _ in range(draw.choice([1, 3, 30])):
                broken[draw.randrange(min(len(broken), 200))] = draw.randrange(256)
            assert isinstance(check_sample(Member("a", bytes(broken), "a"), config, 0, 0), Sample | Rejected)


@pytest.mark.parametrize("kind", ["shard", "folder", "count"])
def test_a_source_without_anything_usable_fails_within_seconds(tmp_path: Path, kind: str) -> None:
    config = DataConfig(sources=(str(tmp_path),), resolution=16, max_samples=5 if kind == "count" else None)
    if kind == "folder":
        for i in range(2000):
            (tmp_path / f"{i}.png").write_bytes(b"rubbish")
    else:
        write_tar(tmp_path / "a.tar", [(f"{i}.png", b"rubbish") for i in range(2000)])
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"none of \d+ samples can be used \(.*no caption.*\)"):
        surveyed(config, seconds=60)
    assert time.monotonic() - began < 10


def test_an_empty_source_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UsageError, match=r"none of 1 samples can be used \(1 x shard without files\)"):
        surveyed(DataConfig(sources=(str(tmp_path),)), seconds=60)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(UsageError, match="is empty; it needs images with captions"):
        surveyed(DataConfig(sources=(str(tmp_path),)), seconds=60)
