"""Shards: how files become samples, whatever their order and names, and that no damage passes for a whole shard."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lcmdistill.data.sources.registry import make_source
from lcmdistill.data.sources.webdataset import (
    BAD_CHECKSUM,
    ENDS_EARLY,
    MANY_ZEROS,
    NAMED_TWICE,
    NO_FILES,
    NOT_A_FILE,
    NOT_ADJACENT,
    NOT_THE_END,
    TOO_LARGE,
)
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import captions, encoded, good, picture, reasons, write_tar

PNG = encoded(picture())


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    """Images, then their captions."""
    return [(f"{key}.png", PNG) for key in keys] + [(f"{key}.txt", key.encode()) for key in keys]


@pytest.fixture
def whole(tmp_path: Path) -> tuple[bytes, list[int]]:
    """A shard of 20 samples, and the offsets of its 40 headers."""
    path = write_tar(tmp_path / "whole.tar", good(range(20)))
    with tarfile.open(path) as archive:
        return path.read_bytes(), [member.offset for member in archive.getmembers()]


def test_files_of_a_sample_are_joined_wherever_they_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    files = pairs("a", "b", "c")
    path = write_tar(tmp_path / "a.tar", [*good([7]), *files])
    assert reasons(path) == {"kept": 4}
    assert captions(path) == ["picture 7", "a", "b", "c"]
    assert caplog.text.count("a.tar: the files of a sample are not side by side; they were joined by their names") == 1
    caplog.clear()
    assert captions(write_tar(tmp_path / "b.tar", sorted(files))) == ["a", "b", "c"]
    assert "side by side" not in caplog.text


def test_what_a_stream_cannot_join_is_counted(tmp_path: Path) -> None:
    found = reasons(write_tar(tmp_path / "a.tar.gz", [*good([7]), *pairs("a", "b")]))
    assert found == {"kept": 1, "no caption": 2, NOT_ADJACENT: 2}


def test_names_with_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    keys = ["1.5 apples", "v1.0/0001", "photo.2021.01", "photo.2021.02", "./dot/a"]
    files = [file for key in keys for file in pairs(key)]
    for name in ("a.tar", "a.tar.gz"):
        assert sorted(map(str, captions(write_tar(tmp_path / name, files)))) == sorted(keys)


def test_further_files_of_a_sample_are_no_samples(tmp_path: Path) -> None:
    files = [("1.png", PNG), ("1.txt", b"a"), ("1.seg.png", PNG), ("1.cls", b"7"), ("1.clip.npy", b"x")]
    assert reasons(write_tar(tmp_path / "a.tar", [*files, ("__meta__/x.json", b"{}"), ("README", b"x")])) == {"kept": 1}
    both = [("1.png", PNG), ("1.txt", b"a"), ("1.5.png", PNG), ("1.5.txt", b"b")]
    assert captions(write_tar(tmp_path / "b.tar", both)) == ["a", "b"]


def test_keys_that_come_back_are_counted_within_a_shard_and_new_in_the_next(tmp_path: Path) -> None:
    for name in ("a/0.tar", "a/1.tar"):
        write_tar(tmp_path / name, good([1, 2]))
    assert reasons(tmp_path / "a") == {"kept": 4}
    assert reasons(write_tar(tmp_path / "b.tar", good([1, 2, 1]))) == {"kept": 2, NAMED_TWICE: 2}
    assert reasons(write_tar(tmp_path / "b.tar.gz", good([1, 2, 1]))) == {"kept": 2, NOT_ADJACENT: 1}


def test_one_bad_member_is_counted_and_ends_nothing(tmp_path: Path) -> None:
    bad = {
        "deep": b"[" * 200_000,
        "cut": b'{"caption": "a',
        "number": b'{"caption": "a", "n": ' + b"1" * 5000 + b"}",
        "encoding": '{"caption": "é"}'.encode("latin-1"),
        "list": b'["a"]',
        "null": b'{"caption": null, "text": "a"}',
        "emoji": json.dumps({"caption": "a \ud83d"}).encode(),
        "watermark": b'{"caption": "a", "pwatermark": 1e999}',
    }
    files = [file for name, raw in bad.items() for file in ((f"{name}.png", PNG), (f"{name}.json", raw))]
    files += [("x" * 300 + ".png", PNG), ("x" * 300 + ".txt", b"a"), ("dir/" * 60 + "a.png", PNG)]
    expected = {"kept": 5, "unreadable JSON": 4, "no caption": 2, "caption is not valid Unicode": 1}
    for name in ("a.tar", "a.tar.gz"):
        assert reasons(write_tar(tmp_path / name, [*good([1, 2]), *files])) == expected


def test_a_pattern_of_endless_shards_is_refused(tmp_path: Path) -> None:
    for word in ("{0..99999999999}.tar", "{000..999}-{0000..9999}.tar"):
        with pytest.raises(UsageError, match=r"names 1\d[\d,]+ shards; at most 1,000,000 are read"):
            make_source(str(tmp_path / word))


def test_links_and_giants_are_counted(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("huge.png")
    sparse.size, sparse.type, sparse.pax_headers = 0, tarfile.REGTYPE, {"GNU.sparse.realsize": f"{1 << 40}"}
    sparse.pax_headers |= {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
    for mode in ("w", "w:gz"):
        path = tmp_path / f"a.tar{'.gz' * (mode == 'w:gz')}"
        with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
            for name, content in good([1]):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for name, kind in (("2.png", tarfile.LNKTYPE), ("2.txt", tarfile.SYMTYPE), ("folder.png", tarfile.DIRTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "0001.png"
                tar.addfile(info)
            tar.addfile(sparse)
        assert reasons(path) == {"kept": 1, NOT_A_FILE: 2, TOO_LARGE: 1}


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(("size", "reason"), [(-512, "unreadable part of a shard (ReadError)"), (1 << 60, TOO_LARGE)])
def test_a_size_that_leads_nowhere_ends_the_shard(
    tmp_path: Path, whole: tuple[bytes, list[int]], size: int, reason: str, compress: Callable[[bytes], bytes]
) -> None:
    raw, at = bytearray(whole[0]), whole[1][20]
    raw[at + 124 : at + 136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # pyright: ignore[reportAttributeAccessIssue]
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    (tmp_path / "a.tar").write_bytes(compress(bytes(raw)))
    found = reasons(tmp_path / "a.tar")
    assert (found["kept"], found[reason]) == (10, 1)


DAMAGES: dict[str, tuple[Callable[[bytes, list[int]], bytes], str]] = {
    "between two members": (lambda raw, at: raw[: at[20]], ENDS_EARLY),
    "within a member": (lambda raw, at: raw[: at[20] + 700], ENDS_EARLY),
    "within a header": (lambda raw, at: raw[: at[20] + 100], ENDS_EARLY),
    "without the mark": (lambda raw, at: raw[: at[39] + 1024], ENDS_EARLY),
    "bad header": (lambda raw, at: raw[: at[20]] + b"\xff" + raw[at[20] + 1 :], ENDS_EARLY),
    "header of zeros": (lambda raw, at: raw[: at[20]] + bytes(512) + raw[at[20] + 512 :], NOT_THE_END),
    "two in one": (lambda raw, at: raw + raw, NOT_THE_END),
    "zeros from a header on": (lambda raw, at: raw[: at[10]] + bytes(len(raw) - at[10]), MANY_ZEROS),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_shard_that_is_not_whole_is_said(tmp_path: Path, whole: tuple[bytes, list[int]], name: str) -> None:
    damage, reason = DAMAGES[name]
    (tmp_path / "a.tar").write_bytes(damage(*whole))
    found = reasons(tmp_path / "a.tar")
    kept = {"two in one": 20, "without the mark": 20, "zeros from a header on": 5}
    # The sample that is cut is counted, and the rest of the shard.
    assert (found["kept"], found[reason]) == (kept.get(name, 10), 2 if name == "within a member" else 1)
    if reason == MANY_ZEROS:  # an archive may be padded: a server that sends it may be right
        assert reasons(f"pipe:cat {tmp_path}/a.tar")[reason] == 1
        return
    with pytest.raises(RunError, match="not a complete tar archive") as caught:
        captions(f"pipe:cat {tmp_path}/a.tar")
    assert reason in str(caught.value) or "Error)" in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 50_000])
def test_a_file_without_members_is_said(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * size)
    (tmp_path / "b.tar").write_bytes(bytes(50_000))
    write_tar(tmp_path / "c.tar", good([1]))
    assert reasons(tmp_path) == {"kept": 1, "unreadable part of a shard (ReadError)": 1, NO_FILES: 1}
    assert reasons(f"pipe:cat {tmp_path}/b.tar") == {NO_FILES: 1}


def test_the_end_mark_may_be_short(tmp_path: Path, whole: tuple[bytes, list[int]]) -> None:
    raw, offsets = whole
    for zeros in (512, 1024, 10_240):
        (tmp_path / "a.tar").write_bytes(raw[: offsets[39] + 1024] + bytes(zeros))
        assert reasons(tmp_path / "a.tar") == {"kept": 20}
        assert reasons(f"pipe:cat {tmp_path}/a.tar") == {"kept": 20}


def test_flipped_bits_of_a_compressed_shard_are_said(tmp_path: Path) -> None:
    """tarfile's own decompression of gzip passes over the checksum."""
    raw = write_tar(tmp_path / "a.tar", [(f"{i}.txt", f"caption {i}".encode()) for i in range(30)]).read_bytes()
    stored = bytearray(gzip.compress(raw, 0))  # not compressed, so that every flipped byte still decompresses
    stored[stored.index(b"caption 17") + 8] ^= 1
    (tmp_path / "b.tar.gz").write_bytes(stored)
    assert reasons(tmp_path / "b.tar.gz") == {"no image": 30, BAD_CHECKSUM: 1}
    with pytest.raises(RunError, match=r"not a complete tar archive \(BadGzipFile\)"):
        captions(f"pipe:cat {tmp_path}/b.tar.gz")
    draw, packed = random.Random(0), gzip.compress(raw)
    for _ in range(40):
        flipped = bytearray(packed)
        flipped[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
        (tmp_path / "c.tar.gz").write_bytes(flipped)
        if {member.problem for member in make_source(str(tmp_path / "c.tar.gz")).members()} == {"no image"}:
            assert gzip.decompress(flipped) == raw  # the bit does not matter


def test_every_compression_is_read(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "plain.tar", good([1])).read_bytes()
    for module in (gzip, bz2, lzma):
        (tmp_path / "a.tar").write_bytes(module.compress(raw))
        assert captions(tmp_path / "a.tar") == captions(f"pipe:cat {tmp_path}/a.tar") == ["picture 1"]


def test_the_bundled_shards_are_counted() -> None:
    source = make_source("tiny")
    assert source.count() == sum(1 for _ in source.members())
