"""Data: what each source yields, what is kept and why the rest is not, the transforms, the cache, and the order."""

import csv
import json
import os
import time
from pathlib import Path

import pytest

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources import teacher
from lcmdistill.data.sources.registry import SOURCES, is_generated, make_source
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.utils.errors import UsageError
from tests.support.data import captions, encoded, good, picture, reasons, surveyed, write_tar


def test_a_word_makes_the_source_of_its_kind(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    shard = write_tar(tmp_path / "shards" / "a.tar", [])
    words = {"teacher": "teacher", "tiny": "tiny", "hf://a/b.tar": "remote", "pipe:cat x": "remote"}
    words |= {str(tmp_path): "folder", str(shard): "shards", str(shard.parent): "shards"}
    sources = {word: make_source(word) for word in words}
    assert {word: source.kind for word, source in sources.items()} == words
    assert set(words.values()) == set(SOURCES)
    assert [word for word, source in sources.items() if source.is_generated] == ["teacher"]
    assert [word for word in words if is_generated(word)] == ["teacher"]
    assert {word for word, source in sources.items() if source.is_remote} == {"hf://a/b.tar", "pipe:cat x"}
    assert (sources[str(tmp_path)].count(), sources["tiny"].count()) == (1, 3625)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_shard_is_read(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / name, good(range(3)))
    assert make_source(str(path)).kind == "shards"
    assert captions(path) == ["picture 0", "picture 1", "picture 2"]
    assert reasons(path) == {"kept": 3}


def test_braces_and_folders_name_many_shards_in_order(tmp_path: Path) -> None:
    for i, name in enumerate(["00.tar", "01.tar", "02.tar"]):
        write_tar(tmp_path / name, good([2 * i, 2 * i + 1]))
    (tmp_path / "README.md").write_text("not a shard")
    every = [f"picture {i}" for i in range(6)]
    assert captions(tmp_path) == every
    assert captions(tmp_path / "{00..02}.tar") == every
    assert captions(tmp_path / "{02,00}.tar") == every[4:] + every[:2]


def test_what_lies_beside_the_shards_of_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "0.tar", good([0]))
    write_tar(tmp_path / "1.TAR", good([1]))
    for name in (".cache/a.png", "logs/a.txt", "0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert captions(tmp_path) == ["picture 0", "picture 1"]
    assert captions(tmp_path / "1.TAR") == ["picture 1"]
    assert not caplog.text
    mixed = tmp_path.rename(tmp_path.with_name("mixed"))
    write_tar(mixed / "more" / "2.tar", good([2]))
    (mixed / "a.png").touch()
    assert captions(mixed) == ["picture 0", "picture 1"]
    assert "only its shards are read, not a.png and 1 more images, archives or folders" in caplog.text
    os.mkfifo(mixed / "9.tar")
    with pytest.raises(UsageError, match=r"there is no shard .*9\.tar"):
        make_source(str(mixed))


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good(range(3)))
    assert captions(f"pipe:cat {path}") == ["picture 0", "picture 1", "picture 2"]


def test_a_source_can_be_left_in_the_middle(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good(range(200)))
    members = make_source(f"pipe:cat {path}").members()
    assert next(iter(members)).caption == "picture 0"
    began = time.monotonic()
    del members
    assert time.monotonic() - began < 5


def test_captions_come_from_the_shard_s_json_where_there_is_no_text(tmp_path: Path) -> None:
    png = encoded(picture())
    files = [("a.png", png), ("a.json", b'{"caption": "a cat"}'), ("b.png", png), ("b.json", b'{"text": "a dog"}')]
    files += [("c.png", png), ("c.txt", b"a cow"), ("c.json", b'{"caption": "no"}')]
    assert captions(write_tar(tmp_path / "a.tar", files)) == ["a cat", "a dog", "a cow"]


def test_an_image_folder_with_texts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(["b.png", "a.PNG", "deep/c.jpg"]):
        picture(i).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    assert make_source(str(tmp_path)).kind == "folder"
    assert captions(tmp_path) == ["caption of a.PNG\n", "caption of b.png\n", "caption of deep/c.jpg\n"]
    assert reasons(tmp_path) == {"kept": 3}


def test_an_image_folder_with_jsonl(tmp_path: Path) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"line\u2028break é {i}"} for i in (2, 0, 1)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "metadata.jsonl").write_text(lines, encoding=encoding)
        assert captions(tmp_path) == [row["text"] for row in rows]
        assert reasons(tmp_path) == {"kept": 3}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # spreadsheets write the latter
def test_an_image_folder_with_csv(tmp_path: Path, encoding: str) -> None:
    with (tmp_path / "metadata.csv").open("w", encoding=encoding, newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["file_name", "text", "pwatermark"])
        for i, watermark in enumerate(["0.1", "0.9", ""]):
            picture(i).save(tmp_path / f"{i}.png")
            table.writerow([f"{i}.png", f'a "quoted", {i}', watermark])
    assert captions(tmp_path) == [f'a "quoted", {i}' for i in range(3)]
    assert reasons(tmp_path) == {"kept": 3}
    strict = DataConfig(resolution=16, max_watermark=0.5)
    assert reasons(tmp_path, strict) == {"kept": 2, "pwatermark above 0.5": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"\xff\xfe\n", r"metadata\.jsonl, line 1: text is not UTF-8"),
        ("metadata.csv", b"file_n\xe4me,text\n", r"metadata\.csv, line 1: text is not UTF-8"),
        ("metadata.csv", b'"file_name" x,text\n', r"metadata\.csv, line 1: not valid CSV"),
        ("metadata.csv", b"", r"metadata\.csv, line 1: no column file_name, but nothing"),
        (
            "metadata.csv",
            b"file_name;text\na.png;b\n",
            r"metadata\.csv, line 1: no column file_name, but file_name;text",
        ),
    ],
)
def test_metadata_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(make_source(str(tmp_path)).members())


def test_the_teacher_s_prompts_are_members_without_an_image(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    members = list(make_source("teacher", prompts=str(path)).members())
    assert [(m.caption, m.image) for m in members] == [("a cat", None), ("a dog", None)]
    judged = check_sample(members[0], DataConfig(resolution=16), 0, 0)
    assert judged == Sample("a cat", None, (16, 16, 0, 0, 16, 16))


def test_the_bundled_prompts_are_many_and_distinct() -> None:
    prompts = read_prompts(None)
    assert len(set(prompts)) == len(prompts) >= 2000


def test_the_bundled_images_are_all_usable() -> None:
    report = surveyed(DataConfig(sources=("tiny",), resolution=64, max_samples=300), seconds=60)[0]
    assert (report.kept, report.rejected) == (300, ())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/absent", "does not exist"),
        ("{tmp}/absent.tar", "there is no shard .*absent.tar"),
        ("{tmp}/{{0..3}}.tar", "there is no shard .*0.tar"),
        ("{tmp}", "holds neither images nor .tar shards"),
        ("{tmp}/file.txt", "is neither a folder nor a .tar shard"),
        ("ftp://host/a.tar.xz", "unknown scheme"),
        (
            "s3://bucket/a.tar",
            "unknown scheme; .* or from the output of a shell command as pipe:COMMAND, such as aws s3 cp",
        ),
        ("{tmp}/*.tar", r"wildcards are not expanded; name the folder, or use braces, such as shards/\{00..99\}.tar"),
        ("{tmp}/x.tar::pipe:touch bad.tar", "there is no shard"),
        ("pi{{pe:touch bad,x}}.tar", r"there is no shard pipe:\.\.\."),
        ("no-such-data", "does not exist"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(UsageError, match=message):
        list(make_source(spec.format(tmp=tmp_path)).members())


@pytest.mark.parametrize("content", [None, b"", b"\n  \n", b"\xff\xfe"])
def test_a_prompts_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--prompts .*prompts\.txt"):
        read_prompts(str(path))


def test_a_device_that_never_ends_is_no_prompts_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "LARGEST_FILE", 2**20)
    with pytest.raises(UsageError, match=r"/dev/zero cannot be read .*larger than 1 MiB"):
        read_prompts("/dev/zero")
