"""Samples without a cache: which process reads what, in which order, from which position, and what becomes of a bad part."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmdistill.config.schema import DataConfig
from lcmdistill.data import stream as streamed
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.sources.base import Member, Source, SourceOptions
from lcmdistill.data.sources.registry import make_source
from lcmdistill.data.stream import Position, SampleStream, check_stream, encode
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import good, prepared, write_tar

CONFIG = DataConfig(resolution=16, cache="off")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(7):
        write_tar(
            folder / f"{i}.tar", [*good(range(3 * i, 3 * i + 3)), (f"{i}-bad.txt", b"a caption without an image")]
        )
    return make_source(str(folder))


def stream(*sources: Source, rank: int = 0, world: int = 1, seed: int = 0) -> SampleStream:
    return SampleStream(sources, CONFIG, seed, lambda caption: None, rank=rank, world=world)


def read(of: SampleStream, count: int) -> list[tuple[str, Position]]:
    return [(sample.caption, after) for (_, sample), after in islice(of.samples(), count)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_an_epoch_visits_each_sample_once_over_all_processes(world: int, shards: Source) -> None:
    found: Counter[str] = Counter()
    for rank in range(world):
        each = read(stream(shards, rank=rank, world=world), 21)
        found += Counter(caption for caption, after in each if after.epoch == 0)
    assert found == Counter(f"picture {i}" for i in range(21))


@pytest.mark.parametrize("world", [8, 30])
def test_fewer_parts_than_processes_are_divided_by_members(world: int, shards: Source) -> None:
    each = [read(stream(shards, rank=rank, world=world), 2) for rank in range(world) if rank < 3]
    assert not {caption for caption, after in each[0] if after.epoch == 0} & {
        c for c, after in each[1] if not after.epoch
    }


def test_epochs_have_orders_of_their_own(shards: Source) -> None:
    captions = [caption for caption, _ in read(stream(shards), 63)]
    epochs = [captions[i : i + 21] for i in (0, 21, 42)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(set(epoch)) == 21 for epoch in epochs)
    assert captions != [caption for caption, _ in read(stream(shards, seed=1), 63)]


@pytest.mark.parametrize(("world", "count"), [(1, 5), (2, 9), (8, 3)])
def test_a_stream_is_read_on_from_a_position(world: int, count: int, shards: Source) -> None:
    whole = [read(stream(shards, rank=rank, world=world), count + 30) for rank in range(min(2, world))]
    for rank, each in enumerate(whole):
        again = stream(shards, rank=rank, world=world)
        again.resume([each[count - 1][1]] * world)
        assert read(again, 30) == each[count:]


def test_other_numbers_of_processes_begin_behind_what_was_being_read(shards: Source) -> None:
    positions = [Position(0, 0, 2), Position(0, 3, 1)]
    epoch_0 = [caption for caption, after in read(stream(shards), 21) if after.place > 3]
    found = []
    for rank in range(3):
        each = stream(shards, rank=rank, world=3)
        each.resume(positions)
        found += [caption for caption, after in read(each, 6) if after.epoch == 0]
    assert sorted(found) == sorted(epoch_0)


def test_rejected_members_are_counted(shards: Source) -> None:
    each = stream(shards)
    list(islice(each.samples(), 60))
    (report,) = each.reports()
    assert report.kept == 60
    assert dict(report.rejected).keys() == {"no image"}
    assert report.num_rejected >= 15


def test_samples_are_those_of_the_cache(spec: str, teacher: Teacher) -> None:
    each = SampleStream([make_source(spec)], CONFIG, 0, teacher.rejects)
    batch, _ = next(each.batches(4))
    got = encode(batch, teacher, CONFIG, 0, prompts_only=False)
    dataset = LatentDataset([prepared(spec, replace(CONFIG, cache="on"), teacher, 0)], [None])
    captions = dataset.captions([True])
    expected = dataset.read([captions.index(sample.caption) for _, sample in batch])
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.std, expected.std, rtol=1e-3, atol=1e-3)
    assert got.cond.values.keys() == expected.cond.values.keys()
    for name, value in expected.cond.values.items():
        torch.testing.assert_close(got.cond[name], value, rtol=1e-3, atol=1e-3)


@dataclass(frozen=True)
class Breaking(Source):
    """Two parts of four members, which break off again and again."""

    breaks: list[int]
    kind = "breaking"

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> None:
        """No word names it."""

    @property
    def num_parts(self) -> int:
        return 2

    def count(self) -> int | None:
        return None

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def read_part(self, index: int) -> Iterator[Member]:
        for i in range(4):
            if self.breaks and self.breaks[0] == i:
                self.breaks.pop(0)
                raise RunError("the connection was reset")
            yield Member(str(i), None, f"{index} {i}")


def test_a_part_that_breaks_off_is_read_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    waited: list[float] = []
    monkeypatch.setattr(streamed.time, "sleep", waited.append)
    found = read(stream(Breaking("x", [0, 1, 1, 3])), 8)
    assert sorted(caption for caption, _ in found) == [f"{part} {i}" for part in (0, 1) for i in range(4)]
    assert waited == [1.0, 1.0, 5.0, 1.0]
    assert "the connection was reset; trying again in 5 s" in caplog.text
    with pytest.raises(RunError, match="reset"):
        read(stream(Breaking("x", [2] * 9)), 8)


def test_a_source_without_usable_samples_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad" / "0.tar", [("a.txt", b"no image")])
    write_tar(tmp_path / "empty" / "0.tar", [])
    with pytest.raises(UsageError, match="none of 1024 samples can be used"):
        read(stream(make_source(str(tmp_path / "bad"))), 1)
    with pytest.raises(UsageError, match="none of"):
        read(stream(make_source(str(tmp_path / "empty"))), 1)


def test_samples_that_are_lost_on_the_way_end_the_run(image_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "pictures")
    samples = stream(make_source(str(folder))).samples()
    next(samples)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match="pictures has lost its samples: a whole pass had no usable one"):
        list(samples)


def test_one_of_several_sources_that_is_lost_is_reported_at_once(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = shutil.copytree(image_folder, tmp_path / "pictures")
    reader = stream(make_source(str(lost)), make_source(str(image_folder)))
    samples, count = reader.samples(), sum(1 for _ in make_source(str(image_folder)).members())
    for _ in range(2 * count):
        next(samples)
    shutil.rmtree(lost)
    for _ in range(6 * count):
        next(samples)
    assert caplog.text.count("pictures has lost its samples") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectory": 4}, r"data\.trajectory needs the cache"),
        ({"teacher_cache_samples": 1}, r"data\.teacher_cache_samples needs the cache"),
        ({"buckets": ("auto",)}, r"data\.buckets needs the cache"),
        ({"max_samples": 4}, r"data\.max_samples needs the cache"),
        ({}, "--data teacher has the teacher generate each image once"),
    ],
)
def test_what_needs_the_cache_is_refused_without_it(changes: dict[str, Any], message: str) -> None:
    sources = [make_source("teacher")]
    with pytest.raises(UsageError, match=message):
        check_stream(replace(CONFIG, **changes), sources)
    check_stream(replace(CONFIG, cache="on", **changes), sources)
    check_stream(CONFIG, [make_source("teacher", prompts_only=True)])


def test_parts_are_what_the_source_yields(shards: Source, image_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(300)))
    for source in (shards, make_source(str(image_folder), seed=3), make_source("teacher", prompts=str(prompts))):
        parts = [member for i in range(source.num_parts) for member in source.members_of_part(i)]
        assert [member.key for member in parts] == [member.key for member in source.members()]
    assert source.num_parts == 3
