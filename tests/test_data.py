"""Data: what each source yields, what is kept and why the rest is not, the transforms, the cache, and the order."""

import csv
import io
import json
import random
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data import chunks
from lcmdistill.data import latent_cache as cache
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import cache_folder, mark_whole, prepare
from lcmdistill.data.sampler import SampleOrder, epoch_order
from lcmdistill.data.sources.base import Member
from lcmdistill.data.sources.registry import SOURCES, kind_of, open_source
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.survey import survey, usable_count
from lcmdistill.data.transforms import Rejected, Sample, judge
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.errors import RunError, UsageError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (20, 20)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(keys: Sequence[int]) -> list[tuple[str, bytes]]:
    """Sound members: a picture and a caption each."""
    pairs = [[(f"{i:04d}.png", encoded(picture(i))), (f"{i:04d}.txt", f"picture {i}".encode())] for i in keys]
    return [file for pair in pairs for file in pair]


def captions(spec: str | Path) -> list[str | None]:
    return [member.caption for member in open_source(str(spec), None)]


def reasons(spec: str | Path, config: DataConfig | None = None) -> Counter[str]:
    """How many members are kept, and why the others are not."""
    config = config or DataConfig(resolution=16)
    outcomes = [judge(member, config, 0, i) for i, member in enumerate(open_source(str(spec), None))]
    return Counter("kept" if isinstance(o, Sample) else o.reason for o in outcomes)


# -- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_shard_is_read(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / name, good(range(3)))
    assert kind_of(str(path)) == "shards"
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


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good(range(3)))
    assert captions(f"pipe:cat {path}") == ["picture 0", "picture 1", "picture 2"]


def test_a_source_can_be_left_in_the_middle(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good(range(200)))
    members = open_source(f"pipe:cat {path}", None)
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
    assert kind_of(str(tmp_path)) == "folder"
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
        ("metadata.jsonl", b"{'a': 1}\n", "is not valid JSON lines"),
        ("metadata.jsonl", b"[1, 2]\n", "must hold one object a line"),
        ("metadata.jsonl", b"\xff\xfe\n", "is not valid JSON lines"),
        ("metadata.csv", b"file_name,text\n\xff.png,x\n", "is not valid CSV"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(open_source(str(tmp_path), None))


def test_the_teacher_s_prompts_are_members_without_an_image(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    members = list(open_source("teacher", str(path)))
    assert [(m.caption, m.image) for m in members] == [("a cat", None), ("a dog", None)]
    judged = judge(members[0], DataConfig(resolution=16), 0, 0)
    assert judged == Sample("a cat", None, (16, 16, 0, 0, 16, 16))


def test_the_bundled_prompts_are_many_and_distinct() -> None:
    prompts = read_prompts(None)
    assert len(set(prompts)) == len(prompts) >= 2000


def test_the_bundled_images_are_all_usable() -> None:
    report = survey(DataConfig(sources=("tiny",), resolution=64, count=300), 0, seconds=60)[0]
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
        ("s3://bucket/a.tar", "unknown scheme; .* or from a command's output, such as 'pipe:aws s3 cp"),
        ("{tmp}/*.tar", r"wildcards are not expanded; name the folder, or use braces, such as shards/\{00..99\}.tar"),
        ("{tmp}/x.tar::pipe:touch bad.tar", "there is no shard"),
        ("pi{{pe:touch bad,x}}.tar", "there is no shard pipe:touch bad.tar"),
        ("no-such-data", "does not exist"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(UsageError, match=message):
        list(open_source(spec.format(tmp=tmp_path), None))


@pytest.mark.parametrize("content", [None, b"", b"\n  \n", b"\xff\xfe"])
def test_a_prompts_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--prompts .*prompts\.txt"):
        read_prompts(str(path))


# -- bad members -----------------------------------------------------------------------------------------------------


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
    assert reasons(path) == {"kept": 5, "corrupt image": 4, "no caption": 3, "no image": 1}


def test_bad_files_of_a_folder_are_counted_with_their_reasons(tmp_path: Path) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"rubbish")
    rows = [{"file_name": f"{i}.png", "text": "a"} for i in (0, 3, 4)]
    rows += [{"file_name": "1.png"}, {"file_name": "1.png", "text": 7}, {"text": "a"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert reasons(tmp_path) == {"kept": 1, "corrupt image": 1, "image file missing": 2, "no caption": 2}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_truncated_shard_gives_what_it_has_and_the_next_one_is_read(tmp_path: Path, name: str) -> None:
    whole = write_tar(tmp_path / name, good(range(20))).read_bytes()
    # An uncompressed shard is cut in a picture: at the border of a member nothing could be noticed.
    cut = len(whole) // 2 if name.endswith("gz") else whole.index(encoded(picture(10))) + 600
    (tmp_path / name).write_bytes(whole[:cut])
    write_tar(tmp_path / "b.tar", good(range(100, 103)))
    found = reasons(tmp_path)
    unreadable = [reason for reason in found if reason.startswith("unreadable part of a shard")]
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
            assert isinstance(judge(Member("a", bytes(broken), "a"), config, 0, 0), Sample | Rejected)


@pytest.mark.parametrize("kind", ["shard", "folder", "count"])
def test_a_source_without_anything_usable_fails_within_seconds(tmp_path: Path, kind: str) -> None:
    config = DataConfig(sources=(str(tmp_path),), resolution=16, count=5 if kind == "count" else None)
    if kind == "folder":
        for i in range(2000):
            (tmp_path / f"{i}.png").write_bytes(b"rubbish")
    else:
        write_tar(tmp_path / "a.tar", [(f"{i}.png", b"rubbish") for i in range(2000)])
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"none of \d+ samples can be used \(.*no caption.*\)"):
        survey(config, 0, seconds=60)
    assert time.monotonic() - began < 10


def test_an_empty_source_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UsageError, match="is empty; it needs images with captions"):
        survey(DataConfig(sources=(str(tmp_path),)), 0, seconds=60)


# -- transforms ------------------------------------------------------------------------------------------------------


def pixels(image: Image.Image | bytes, **options: Any) -> Tensor:
    place = options.pop("place", 0)
    config = DataConfig(**{"resolution": 16, **options})
    raw = image if isinstance(image, bytes) else encoded(image)
    outcome = judge(Member("a", raw, "a caption"), config, 0, place)
    assert isinstance(outcome, Sample), outcome
    assert outcome.pixels is not None
    return outcome.pixels


def test_a_square_image_of_the_right_size_is_left_as_it_is() -> None:
    image = picture(size=(16, 16))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    found = pixels(image)
    assert (found.dtype, found.shape) == (torch.float32, (3, 16, 16))
    assert torch.equal(found, expected)
    assert (found.min() >= -1, found.max() <= 1) == (True, True)


def stripes(width: int, height: int) -> Image.Image:
    """Every column of one grey, from black on the left to white on the right."""
    row = np.linspace(0, 255, width).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


def test_the_shorter_side_fills_the_square_and_the_centre_is_kept() -> None:
    found = pixels(stripes(96, 32), resolution=16)
    assert found.shape == (3, 16, 16)
    row = (found[0, 8] + 1) / 2
    # the middle third of the stripes
    assert row[0].item() == pytest.approx(1 / 3 + 1 / 96, abs=0.02)
    assert row[-1].item() == pytest.approx(2 / 3 - 1 / 96, abs=0.02)
    assert torch.equal(pixels(stripes(96, 32).transpose(Image.Transpose.TRANSPOSE)), found.transpose(1, 2))


def test_a_random_crop_moves_with_the_place_and_the_seed_alone() -> None:
    image = stripes(96, 32)
    lefts = {round(pixels(image, crop="random", place=place)[0, 0, 0].item(), 4) for place in range(20)}
    assert len(lefts) > 10
    assert torch.equal(pixels(image, crop="random", place=3), pixels(image, crop="random", place=3))
    assert len({round(pixels(image, place=place)[0, 0, 0].item(), 4) for place in range(20)}) == 1


def test_flipping_mirrors_half_of_the_images() -> None:
    image = stripes(16, 16)
    straight, mirrored = pixels(image), pixels(image).flip(2)
    found = [pixels(image, flip=True, place=place) for place in range(60)]
    flips = sum(torch.equal(each, mirrored) for each in found)
    assert 15 < flips < 45
    assert flips + sum(torch.equal(each, straight) for each in found) == 60


def test_an_image_lies_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = stripes(16, 16)
    turned = pixels(encoded(image, exif=exif))
    assert torch.equal(turned, pixels(image.transpose(Image.Transpose.ROTATE_270)))


def test_transparency_is_composed_on_white() -> None:
    image = picture(size=(16, 16)).convert("RGBA")
    alpha = np.zeros((16, 16), dtype=np.uint8)
    alpha[:, 8:] = 255
    image.putalpha(Image.fromarray(alpha))
    found = pixels(image)
    assert bool((found[:, :, :8] == 1).all())
    assert torch.equal(found[:, :, 8:], pixels(picture(size=(16, 16)))[:, :, 8:])


def test_a_palette_with_a_transparent_colour_is_composed_on_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (8, 0, 16, 16))
    assert pixels(image)[:, 0, 0].tolist() == [1, -1, -1]
    found = pixels(encoded(image, transparency=0))
    assert found[:, 0, 0].tolist() == [1, 1, 1]
    assert found[:, 0, 12].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    found = pixels(encoded(stripes(16, 16).convert(mode), kind))
    assert (found[:, 8, 1].mean().item() < -0.5, found[:, 8, 14].mean().item() > 0.5) == (True, True)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = (np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).astype(np.uint16)
    expected = torch.arange(256).view(16, 16).float() / 127.5 - 1
    assert torch.equal(pixels(encoded(Image.fromarray(ramp)))[0], expected)


def test_a_sliver_does_not_fill_the_memory() -> None:
    assert pixels(Image.new("RGB", (60000, 1), "red"), resolution=512).shape == (3, 512, 512)


def test_small_images_are_skipped_on_request() -> None:
    member = Member("a", encoded(picture(size=(40, 20))), "a caption")
    assert isinstance(judge(member, DataConfig(resolution=16, min_size=20), 0, 0), Sample)
    assert judge(member, DataConfig(resolution=16, min_size=21), 0, 0) == Rejected("smaller than 21 px")


@pytest.mark.parametrize(
    ("meta", "kept"),
    [({}, True), ({"pwatermark": 0.4}, True), ({"pwatermark": 0.6}, False), ({"pwatermark": None}, True)],
)
def test_watermarks_are_skipped_on_request_and_what_does_not_say_passes(meta: dict[str, Any], kept: bool) -> None:
    member = Member("a", encoded(picture()), "a caption", meta)
    assert isinstance(judge(member, DataConfig(resolution=16, max_watermark=0.5), 0, 0), Sample) == kept
    assert isinstance(judge(member, DataConfig(resolution=16), 0, 0), Sample)


def test_white_space_in_a_caption_is_joined() -> None:
    assert judge(Member("a", None, " a\n cat \t"), DataConfig(), 0, 0) == Sample(
        "a cat", None, (512, 512, 0, 0, 512, 512)
    )


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Teacher:
    return load_teacher(str(small_teacher))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 4)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return str(write_tar(tmp_path / "data.tar", [*good(range(5)), ("bad.txt", b"a"), *good(range(5, 10))]))


def config_for(spec: str, cache_dir: Path, **options: Any) -> DataConfig:
    return DataConfig(sources=(spec,), resolution=16, cache_dir=str(cache_dir), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Counting:
    """How many images a teacher's VAE encodes."""

    def __init__(self, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, encode = 0, teacher.vae.encode

        def counted(pixels: Tensor, *args: Any, **options: Any) -> Any:
            self.images += len(pixels)
            return encode(pixels, *args, **options)

        monkeypatch.setattr(teacher.vae, "encode", counted)


def test_a_source_is_encoded_once(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, config = Counting(teacher, monkeypatch), config_for(spec, tmp_path / "cache")
    folder = prepare(spec, config, teacher, 0)
    assert counting.images == 10
    assert list(contents(folder)) == [
        "00000000-00000004.safetensors",
        "00000004-00000008.safetensors",
        "00000008-00000011.safetensors",
    ]
    before = contents(folder)
    assert prepare(spec, config, teacher, 0) == folder
    assert (counting.images, contents(folder)) == (10, before)
    dataset = LatentDataset([folder], [None])
    assert (len(dataset), dataset.reports[0].kept, dataset.reports[0].rejected) == (10, 10, (("no image", 1),))


def test_progress_is_told_within_a_chunk(
    tmp_path: Path, teacher: Teacher, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_PIXELS_AT_ONCE", 4 * 16**2)
    done: list[int] = []
    prepare(spec, config_for(spec, tmp_path / "cache"), teacher, 0, on_progress=done.append)
    assert (len(done), done[0], done[-1]) == (4, 0, 11)  # ten samples four at a time, and the chunk's end
    assert done == sorted(done)


def test_an_interrupted_preparation_goes_on_where_it_stopped(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(prepare(spec, config_for(spec, tmp_path / "whole"), teacher, 0))
    counting, config = Counting(teacher, monkeypatch), config_for(spec, tmp_path / "cache")

    def stop(done: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec, config, teacher, 0, on_progress=stop)
    assert counting.images == 7
    folder = prepare(spec, config, teacher, 0)
    assert counting.images == 10
    assert contents(folder) == whole


def test_a_chunk_that_fails_to_be_written_leaves_nothing(
    tmp_path: Path, teacher: Teacher, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks, "save_file", fail)
    config = config_for(spec, tmp_path / "cache")
    with pytest.raises(OSError, match="No space left"):
        prepare(spec, config, teacher, 0)
    assert contents(cache_folder(spec, config, teacher, 0)) == {}


@pytest.mark.parametrize("source", ["shard", "teacher"])
def test_two_ranks_prepare_what_one_does(
    tmp_path: Path, teacher: Teacher, spec: str, source: str, small_chunks: None
) -> None:
    options: dict[str, Any] = {}
    if source == "teacher":
        (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
        spec, options = "teacher", {"prompts": str(tmp_path / "prompts.txt"), "count": 10, "draw_steps": 2}
    one = prepare(spec, config_for(spec, tmp_path / "one", **options), teacher, 0)
    config = config_for(spec, tmp_path / "two", **options)
    shares = []
    for rank in (0, 1):
        before = set(contents(cache_folder(spec, config, teacher, 0))) if rank else set()
        folder = prepare(spec, config, teacher, 0, rank=rank, world=2)
        shares.append(set(contents(folder)) - before)
    assert [len(share) for share in shares] == [2, 1]
    assert contents(folder) == contents(one)


def test_what_shapes_the_latents_is_in_the_key(tmp_path: Path, teacher: Teacher, spec: str) -> None:
    config = config_for(spec, tmp_path / "cache")

    def key(config: DataConfig = config, seed: int = 0, teacher: Teacher = teacher, spec: str = spec) -> Path:
        return cache_folder(spec, config, teacher, seed)

    assert key(seed=1) == key()  # nothing is drawn
    assert key(replace(config, caption_drop=0.5, count=3, guidance_scale=2.0)) == key()  # nothing of it is encoded
    crops = replace(config, crop="random")
    assert key(crops, seed=1) != key(crops)
    drawn = replace(config, sources=("teacher",))
    changed = [
        key(),
        key(replace(config, resolution=32)),
        key(replace(config, flip=True)),
        key(replace(config, min_size=5)),
        key(replace(config, max_watermark=0.5)),
        key(crops),
        key(drawn, spec="teacher"),
        key(drawn, spec="teacher", seed=1),
        key(replace(drawn, guidance_scale=2.0), spec="teacher"),
        key(replace(drawn, draw_steps=3), spec="teacher"),
    ]
    (tmp_path / "prompts.txt").write_text("a cat")
    changed.append(key(replace(drawn, prompts=str(tmp_path / "prompts.txt")), spec="teacher"))
    Path(spec).write_bytes(Path(spec).read_bytes() + b"\0" * 512)
    changed.append(key())
    assert len(set(changed)) == len(changed)


def test_the_teacher_is_in_the_key(tmp_path: Path, teacher: Teacher, small_teacher: Path, spec: str) -> None:
    config = config_for(spec, tmp_path / "cache")
    keys = {name: cache_folder(name, config, teacher, 0) for name in (spec, "teacher")}

    def changed(file: str, **values: Any) -> dict[str, bool]:
        """Whether a teacher with another config has other keys, for images and for its own draws."""
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(small_teacher, folder)
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        other = load_teacher(str(folder))
        return {name: cache_folder(name, config, other, 0) != keys[name] for name in keys}

    assert changed("vae/config.json") == {spec: False, "teacher": False}  # the same elsewhere is the same
    assert changed("vae/config.json", scaling_factor=0.25) == {spec: True, "teacher": True}
    scheduler = "scheduler/scheduler_config.json"
    assert changed(scheduler, prediction_type="v_prediction") == {spec: False, "teacher": True}
    assert changed(scheduler, beta_end=0.02) == {spec: False, "teacher": True}


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_the_weights_are_in_the_key(tmp_path: Path, small_teacher: Path, spec: str, part: str) -> None:
    config, teacher = config_for(spec, tmp_path / "cache"), load_teacher(str(small_teacher))
    before = [cache_folder(name, config, teacher, 0) for name in (spec, "teacher")]
    next(getattr(teacher.pipeline, part).parameters()).data.view(-1)[0] += 1
    after = [cache_folder(name, config, teacher, 0) for name in (spec, "teacher")]
    # the network has no part in latents of images
    assert [a != b for a, b in zip(before, after, strict=True)] == [part != "unet", True]


def test_the_values_are_the_vae_s_posterior_and_the_text_encoder_s(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None
) -> None:
    config = config_for(spec, tmp_path / "cache")
    dataset = LatentDataset([prepare(spec, config, teacher, 0)], [None])
    mean, std, cond = dataset.read([7, 0])
    images = torch.stack([pixels(picture(i)) for i in (7, 0)])
    with torch.no_grad():
        posterior = teacher.vae.encode(images).latent_dist
    assert teacher.vae.config.scaling_factor == 0.5
    # stored in half precision
    torch.testing.assert_close(mean, posterior.mean * 0.5, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(std, posterior.std * 0.5, rtol=1e-3, atol=1e-4)
    expected = teacher.encode_prompts(["picture 7", "picture 0"])["prompt_embeds"]
    torch.testing.assert_close(cond["prompt_embeds"], expected, rtol=1e-3, atol=1e-3)
    assert {mean.dtype, std.dtype, cond["prompt_embeds"].dtype} == {torch.float32}


def test_the_teacher_s_draws_do_not_depend_on_the_batch(
    tmp_path: Path, teacher: Teacher, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    found = []
    for at_once in (1, 3):
        monkeypatch.setattr(chunks, "_PIXELS_AT_ONCE", at_once * 16 * 16)
        config = config_for(
            "teacher", tmp_path / str(at_once), prompts=str(tmp_path / "prompts.txt"), count=7, draw_steps=3
        )
        dataset = LatentDataset([prepare("teacher", config, teacher, 0)], [7])
        assert len(dataset) == 7  # the prompts go round
        found.append(dataset.read(range(7)))
    (mean, std, cond), (other_mean, _, other_cond) = found
    torch.testing.assert_close(mean, other_mean, rtol=2e-3, atol=2e-3)
    assert torch.equal(cond["prompt_embeds"], other_cond["prompt_embeds"])
    assert bool((std == 0).all())
    assert torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][3])  # the same prompt again ...
    assert (mean[0] - mean[3]).abs().max() > 0.1  # ... on other noise
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(chunks.derive_seed(0, "draw", 2)))
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 7.5, "scheduler": "DPMSolverMultistepScheduler"}
    drawn = teacher.draw_latents(["a cow"], noise[None], **options)
    torch.testing.assert_close(mean[2:3], drawn, rtol=2e-3, atol=2e-3)


def test_a_larger_count_adds_to_a_smaller_one(tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None) -> None:
    config = config_for(spec, tmp_path / "cache")
    lengths = {}
    for count in (3, 11, 6):
        folder = prepare(spec, replace(config, count=count), teacher, 0)
        lengths[count] = len(LatentDataset([folder], [count]))
    assert lengths == {3: 3, 11: 10, 6: 5}  # the sixth member is a bad one
    assert len(LatentDataset([folder], [3])) == 3
    few = LatentDataset([folder], [6]).read(range(5))[0]
    torch.testing.assert_close(few, LatentDataset([folder], [11]).read(range(5))[0], rtol=2e-3, atol=1e-4)


def test_members_that_were_removed_from_a_cache_are_missed(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None
) -> None:
    """By a run that made room, or by hand: fewer samples than were asked for must not go unnoticed."""
    config = replace(config_for(spec, tmp_path / "cache"), count=11)
    folder = prepare(spec, config, teacher, 0)
    mark_whole(folder, 11)
    for lost in (0, 1):
        sorted(folder.glob("*.safetensors"))[lost].unlink()
        with pytest.raises(RunError, match=r"were removed while this run filled it.*raise data\.cache_limit"):
            mark_whole(folder, 11)
        assert len(LatentDataset([prepare(spec, config, teacher, 0)], [11])) == 10
        mark_whole(folder, 11)


@pytest.mark.parametrize("metadata", [False, True])
def test_a_choice_from_a_folder_is_of_all_of_it_and_a_larger_one_adds_to_it(
    tmp_path: Path, teacher: Teacher, small_chunks: None, monkeypatch: pytest.MonkeyPatch, metadata: bool
) -> None:
    data, names = tmp_path / "data", [f"{i:03d}.png" for i in range(100)]
    data.mkdir()
    for i, name in enumerate(names):
        picture(i).save(data / name)
        if not metadata:
            (data / name).with_suffix(".txt").write_text(name)
    if metadata:
        rows = [json.dumps({"file_name": name, "text": name}) for name in names]
        (data / "metadata.jsonl").write_text("\n".join(rows))

    def order(seed: int | None) -> list[str]:
        return [str(member.caption) for member in open_source(str(data), None, seed)]

    assert order(None) == names
    assert sorted(order(0)) == names
    assert len({tuple(order(seed)) for seed in (None, 0, 1)}) == 3
    assert order(0) == order(0)
    tens = Counter(name[1] for name in order(0)[:50])
    assert len(tens) == 10  # from every part of the listing
    config = config_for(str(data), tmp_path / "cache")
    assert cache_folder(str(data), config, teacher, 0) != cache_folder(str(data), config, teacher, 1)
    counting = Counting(teacher, monkeypatch)
    few = contents(prepare(str(data), replace(config, count=8), teacher, 0))
    assert counting.images == 8
    many = contents(prepare(str(data), replace(config, count=20), teacher, 0))
    assert counting.images == 20
    assert many.items() > few.items()


def test_what_a_count_leaves_out_is_said(tmp_path: Path, spec: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        picture(i).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a")

    def said(spec: Path | str, count: int | None) -> str:
        config = DataConfig(sources=(str(spec),), resolution=16, count=count)
        return cache.left_out(str(spec), config, survey(config, 0, seconds=60)[0])

    why = "taken (data.count, by default as many as the run can use; a larger one takes more)"
    assert said(data, 2) == f"; 2 of 3 {why}"
    assert said(spec, 6) == f"; the first 6 {why}"  # nobody knows how many there are
    assert said("teacher", 5) == f"; 5 of {len(read_prompts(None))} {why}"
    assert {said(data, 3), said(data, None), said(spec, 100), said("teacher", 3000)} == {""}
    config = DataConfig(sources=("teacher",), resolution=16, count=5)
    report = survey(config, 0, seconds=60)[0]
    assert cache.left_out("teacher", config, report, takes_prompts=False) == "", "there is nothing to take from"


def test_a_cache_that_cannot_be_written_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.check_cache(DataConfig(cache_dir=str(tmp_path / "new" / "deep")))
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(UsageError, match=r"data\.cache_dir .*file.* cannot be written to \(.*file: a file\)"):
            cache.check_cache(DataConfig(cache_dir=str(tmp_path / name)))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match=r"data\.cache_dir .*new cannot be written to \(.*: no permission\)"):
        cache.check_cache(DataConfig(cache_dir=str(tmp_path / "new")))


def test_two_sources_make_one_data_set(tmp_path: Path, teacher: Teacher, spec: str) -> None:
    other = str(write_tar(tmp_path / "other.tar", good([50])))
    folders = [prepare(each, config_for(each, tmp_path / "cache"), teacher, 0) for each in (spec, other)]
    dataset = LatentDataset(folders, [None, None])
    assert len(dataset) == 11
    assert torch.equal(dataset.read([10])[0], LatentDataset(folders[1:], [None]).read([0])[0])


def test_a_source_without_anything_usable_is_given_up(
    tmp_path: Path, teacher: Teacher, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "GIVE_UP_AFTER", 8)
    spec = str(write_tar(tmp_path / "bad.tar", [(f"{i}.txt", b"a") for i in range(100)]))
    with pytest.raises(UsageError, match=r"none of 8 samples can be used \(8 x no image\)"):
        prepare(spec, config_for(spec, tmp_path / "cache"), teacher, 0)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, small_teacher: Path, spec: str) -> None:
    teacher = load_teacher(str(small_teacher))
    next(teacher.vae.parameters()).data.fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        prepare(spec, config_for(spec, tmp_path / "cache"), teacher, 0)


@pytest.mark.parametrize(
    ("sources", "needed", "count"),
    [(("teacher",), 100, 128), (("teacher",), 10**6, None), (("tiny",), 10**6, 10**6), (("tiny", "teacher"), 129, 256)],
)
def test_no_more_is_prepared_than_a_run_can_use(sources: tuple[str, ...], needed: int, count: int | None) -> None:
    expected = len(read_prompts(None)) if count is None else -(-count // 128) * 128
    assert usable_count(DataConfig(sources=sources), needed) == expected
    assert usable_count(DataConfig(sources=sources, count=7), needed) == 7


# -- the order -------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_each_sample_once_and_the_next_one_in_another_order() -> None:
    order = SampleOrder(10, seed=0, global_batch=4)
    visited = [index for step in range(10) for index in order.indices(step, range(4))]
    epochs = [visited[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[1] == epoch_order(10, 0, 1).tolist()
    assert epoch_order(10, 1, 1).tolist() != epochs[1]


def test_the_order_is_a_function_of_the_place_so_that_nothing_is_lost_on_the_way() -> None:
    whole = SampleOrder(10, seed=0, global_batch=6)
    before = [whole.indices(step, range(6)) for step in range(9)]
    # resumed at step 5; cut into two processes or micro-batches; a batch larger than the data
    assert [SampleOrder(10, 0, 6).indices(step, range(6)) for step in range(5, 9)] == before[5:]
    halves = [[SampleOrder(10, 0, 6).indices(step, places) for places in (range(3), range(3, 6))] for step in range(9)]
    assert [a + b for a, b in halves] == before
    assert Counter(SampleOrder(3, 0, 7).indices(0, range(6))) == {0: 2, 1: 2, 2: 2}


def test_every_source_is_told_from_its_spelling() -> None:
    assert {kind_of("teacher"), kind_of("tiny"), kind_of("hf://a/b.tar"), kind_of("pipe:cat x")} == {
        "teacher",
        "tiny",
        "shards",
    }
    assert set(SOURCES) == {"teacher", "tiny", "shards", "folder"}
