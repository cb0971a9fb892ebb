"""Damaged files of data: what cannot be used is counted, refused in one sentence or made again, and never passed over."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.chunks import is_complete, read_intact, write_tensors
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import mark_complete
from lcmdistill.data.sources.registry import make_source
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.evaluation.sweep import cached_latents
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import config_for, contents, good, picture, prepared, write_tar


def flip(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    """Return a damage that flips a bit at a place, as a function of the size."""

    def flipped(raw: bytes) -> bytes:
        i = at(len(raw))
        return raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1 :]

    return flipped


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda raw: None,
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "one byte": lambda raw: raw[:1],
    "one byte less": lambda raw: raw[:-1],
    "zeros": lambda raw: bytes(len(raw)),
    "rubbish": lambda raw: b"\xff\x00{[<" * (len(raw) // 5),
    "header": flip(lambda size: min(3, size - 1)),
    "data": flip(lambda size: size // 2),
}


def damage(path: Path, name: str) -> None:
    content = DAMAGES[name](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


def samples(word: Path) -> tuple[list[tuple[str, Tensor]], int]:
    """Return caption and pixels of the samples of a source that can be used, and how many members cannot be."""
    outcomes = [
        check_sample(member, DataConfig(resolution=16), 0, i)
        for i, member in enumerate(make_source(str(word)).members())
    ]
    usable = [(o.caption, o.pixels) for o in outcomes if isinstance(o, Sample) and o.pixels is not None]
    return usable, len(outcomes) - len(usable)


def write_sources(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write a small source of each kind, and return {file to damage: (source, that file)}."""
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(4)]
    for kind in ("captions", "jsonl", "csv"):
        (folder / kind).mkdir()
        for i in range(4):
            picture(i).save(folder / kind / f"{i}.png")
            if kind == "captions":
                (folder / kind / f"{i}.txt").write_text(f"picture {i}")
    (folder / "jsonl" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = "".join(f'{row["file_name"]},"{row["text"]}"\r\n' for row in rows)
    (folder / "csv" / "metadata.csv").write_text("file_name,text\r\n" + table)
    shards = {name: write_tar(folder / name, good(range(4))) for name in ("a.tar", "a.tar.gz")}
    return {
        "image": (folder / "captions", folder / "captions" / "1.png"),
        "caption": (folder / "captions", folder / "captions" / "1.txt"),
        "image of a row": (folder / "jsonl", folder / "jsonl" / "1.png"),
        "metadata.jsonl": (folder / "jsonl", folder / "jsonl" / "metadata.jsonl"),
        "metadata.csv": (folder / "csv", folder / "csv" / "metadata.csv"),
        **{name: (path, path) for name, path in shards.items()},
    }


UNNOTICED = {("caption", name) for name in ("half", "one byte", "one byte less", "header", "data")}
UNNOTICED.add(("metadata.csv", "data"))
"letters of text that has no checksum"

FILES = ("image", "caption", "image of a row", "metadata.jsonl", "metadata.csv", "a.tar", "a.tar.gz")


@pytest.mark.parametrize("damaged", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_sources_are_counted_or_refused(tmp_path: Path, file: str, damaged: str) -> None:
    source, path = write_sources(tmp_path)[file]
    before, num_rejected = samples(source)
    assert (len(before), num_rejected) == (4, 0)
    damage(path, damaged)
    try:
        after, num_rejected = samples(source)
    except (UsageError, RunError):
        return
    is_same = [caption for caption, _ in after] == [caption for caption, _ in before]
    is_same = is_same and all(torch.equal(a[1], b[1]) for a, b in zip(after, before, strict=True))
    assert is_same or num_rejected or (len(after) == 4 and (file, damaged) in UNNOTICED)


@pytest.mark.parametrize("damaged", [*DAMAGES, "metadata"])
def test_damaged_chunks_are_made_again(tmp_path: Path, teacher: Teacher, damaged: str) -> None:
    word = str(write_tar(tmp_path / "a.tar", good(range(4))))
    config = config_for(word, tmp_path / "cache")
    folder = prepared(word, config, teacher, 0)
    mark_complete(folder, None)
    whole = contents(folder)
    (path,) = folder.glob("*.safetensors")
    if damaged == "metadata":
        path.write_bytes(path.read_bytes().replace(b"kept", b"kepT"))
    else:
        damage(path, damaged)
    assert not is_complete(path)
    assert contents(prepared(word, config, teacher, 0)) == whole
    assert len(LatentDataset([folder], [None])) == 4


@pytest.mark.parametrize("damaged", DAMAGES)
@pytest.mark.parametrize("is_list", [False, True])
def test_damaged_latents_are_generated_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str, is_list: bool
) -> None:
    path, calls = tmp_path / "a.safetensors", []
    latents = torch.arange(24.0).view(2, 3, 4)

    def generate(done: dict[int, Tensor]) -> Tensor | list[Tensor]:
        calls.append(1)
        return list(latents) if is_list else latents

    first = cached_latents(path, generate, "on a cpu")
    again = cached_latents(path, generate)
    assert (len(calls), again.conditions) == (1, "on a cpu")
    assert torch.equal(torch.stack(list(again.latents)), latents)
    del again  # its tensors are mapped from the file
    damage(path, damaged)
    repaired = cached_latents(path, generate)
    assert len(calls) == 2
    assert ("is damaged; it will be made again" in caplog.text) == (damaged != "missing")
    for each in (first, repaired, cached_latents(path, generate)):
        assert torch.equal(torch.stack(list(each.latents)), latents)
    assert len(calls) == 2


def test_every_flipped_byte_of_a_cache_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"mean": torch.arange(6.0), "row": torch.arange(3)}, {"kept": 3, "rejected": {"a": 1}})
    raw = path.read_bytes()
    assert read_intact(path) is not None
    for i in range(len(raw)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
        intact = read_intact(path)
        # A space of the header's padding is nobody's.
        assert intact is None or raw[i : i + 1] == b" ", i
