"""Aspect-ratio buckets: how images are cropped, cached, reported and ordered, and that a run on them is like any other."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.buckets import bucket_sizes, equal_areas, largest, nearest
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.sampler import SampleOrder, Shape
from lcmdistill.data.sources.registry import make_source
from lcmdistill.data.transforms import Sample, check_sample, transform
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.compile import REPAID_AFTER, should_compile
from lcmdistill.training.memory.estimate import step_memory
from lcmdistill.training.preflight import validate_for_teacher
from lcmdistill.utils.errors import UsageError
from tests.support.data import cache_of, encoded, picture, prepared, surveyed, write_tar
from tests.support.models import FAMILY_BUILDERS
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL, Command

SIZES = [(48, 64), (40, 40), (64, 48), (30, 64), (64, 31)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> diffusers folder of a small random model."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        names = ("sd1", "sdxl", "inpainting", "pixart")
        return {name: FAMILY_BUILDERS[name](tmp_path_factory.mktemp(name) / "model") for name in names}


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of five shapes, (width, height)."""
    folder = tmp_path_factory.mktemp("shapes")
    for i in range(20):
        width, height = SIZES[i % 5]
        noise = np.random.default_rng(i).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i % 3}")
    return folder


def config_for(data: Path, cache: Path, **options: Any) -> DataConfig:
    return DataConfig(
        **{"sources": (str(data),), "resolution": 32, "buckets": ("auto",), "cache_dir": str(cache), **options}
    )


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (64, 8), (32, 8)])
def test_the_sizes_are_those_of_diffusers(resolution: int, step: int) -> None:
    from diffusers import training_utils

    if not hasattr(training_utils, "generate_aspect_ratio_buckets"):
        pytest.skip("this diffusers has none")
    theirs: Any = training_utils.generate_aspect_ratio_buckets
    sizes = bucket_sizes(DataConfig(resolution=resolution, buckets=("auto",)), 8)
    assert sizes == equal_areas(resolution, step) == theirs(resolution, step)
    assert sizes[0] == (resolution, resolution)
    assert all(0.7 < h * w / resolution**2 < 1.2 for h, w in sizes)


def test_an_image_goes_to_the_nearest_shape() -> None:
    sizes = equal_areas(512, 64)
    for h, w in sizes:
        assert nearest(h, w, sizes) == nearest(3 * h, 3 * w, sizes) == (h, w)
    assert (nearest(100, 4000, sizes), nearest(4000, 100, sizes)) == ((384, 704), (704, 384))
    assert nearest(700, 1000, sizes) == (448, 640)
    assert (bucket_sizes(DataConfig(), 8), bucket_sizes(DataConfig(buckets=("64x32", "32x64")), 8)) == (
        [],
        [(32, 64), (64, 32)],
    )
    assert largest(DataConfig(resolution=64, buckets=("64x96", "128x32")), 8) == (64, 96)
    assert largest(DataConfig(resolution=64), 8) == (64, 64)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("image_size", [(80, 40), (40, 80), (60, 40), (40, 40)])
@pytest.mark.parametrize("size", [(20, 30), (30, 20)])
def test_a_frame_says_where_in_the_resized_image_the_bucket_lies(
    size: tuple[int, int], image_size: tuple[int, int], flip: bool
) -> None:
    class Fixed(random.Random):
        def randint(self, a: int, b: int) -> int:
            return b // 2

        def random(self) -> float:
            return 0.0

    x, y = np.meshgrid(np.arange(image_size[0]), np.arange(image_size[1]))
    image = Image.fromarray(np.stack([3 * x, 3 * y, x + y], axis=-1).astype(np.uint8))
    pixels, frame = transform(image, size, "random", flip, Fixed(0))
    assert (pixels.shape, frame[:2], frame[4:]) == ((3, *size), image_size[::-1], size)
    scale = max(size[0] / image_size[1], size[1] / image_size[0])  # it fills the bucket, and no more
    whole = image.resize((round(image_size[0] * scale), round(image_size[1] * scale)), Image.Resampling.LANCZOS)
    whole = ImageOps.mirror(whole) if flip else whole
    top, left = frame[2:4]
    assert (top + size[0] <= whole.height, left + size[1] <= whole.width) == (True, True)
    cut = np.asarray(whole.crop((left, top, left + size[1], top + size[0])), dtype=np.float32)
    assert np.abs(cut / 127.5 - 1 - pixels.permute(1, 2, 0).numpy()).max() < 0.04


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_each_sample_is_kept_at_its_bucket_s_size(
    kind: str, folders: dict[str, Path], shapes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcmdistill.data import latent_cache as cache

    monkeypatch.setattr(cache, "CHUNK", 8)
    teacher, data = load_teacher(str(folders["sdxl"])), shapes_folder
    if kind == "shards":
        members = [(p.name, p.read_bytes()) for p in sorted(shapes_folder.iterdir())]
        data = write_tar(tmp_path / "data.tar", members)
    config = config_for(data, tmp_path / "cache")
    sizes = bucket_sizes(config, teacher.multiple)
    folder = prepared(str(data), config, teacher, 0)
    dataset = LatentDataset([folder], [None])
    assert len(dataset) == len(dataset.shapes) == 20
    expected = []
    for place, member in enumerate(make_source(str(data), seed=0).members()):
        outcome = check_sample(member, config, 0, place, sizes=sizes)
        assert isinstance(outcome, Sample)
        expected.append(outcome)
    counts = Counter("{}x{}".format(*each.frame[4:]) for each in expected)
    assert dict(dataset.reports[0].buckets) == counts
    assert len(counts) == 5
    (report,) = surveyed(config, seconds=60, teacher=teacher)
    assert (report.buckets, str(report)) == (dataset.reports[0].buckets, str(dataset.reports[0]))
    assert "20 kept, 0 dropped; 4 at 24x40" in str(report)
    # Chunk by chunk, and in a chunk by size.
    in_order = [
        s for i in range(0, 20, 8) for s in sorted(expected[i : i + 8], key=lambda s: "{}x{}".format(*s.frame[4:]))
    ]
    for index, sample in enumerate(in_order):
        mean, std, cond, _ = dataset.read([index])
        assert tuple(mean.shape[2:]) == dataset.shapes[index] == tuple(side // 4 for side in sample.frame[4:])
        assert sample.pixels is not None
        exact, spread = teacher.encode_images(sample.pixels[None])
        torch.testing.assert_close(mean, exact, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(std, spread, rtol=2e-3, atol=2e-3)
        assert cond["time_ids"].tolist() == [list(sample.frame)]
        condition = teacher.encode_prompts([sample.caption])
        torch.testing.assert_close(cond["prompt_embeds"], condition["prompt_embeds"], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(cond["pooled"], condition["pooled"], rtol=2e-3, atol=2e-3)
    shares = [
        prepared(str(data), config_for(data, tmp_path / "two"), teacher, 0, rank=rank, world=2) for rank in (0, 1)
    ]
    assert {p.name: p.read_bytes() for p in shares[1].iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    others = [config_for(data, tmp_path / "cache", buckets=which) for which in (None, ("32x32", "24x40"))]
    assert len({cache_of(str(data), each, teacher, 0) for each in (config, *others)}) == 3


def test_a_batch_of_a_bucket_has_its_sizes(folders: dict[str, Path], shapes_folder: Path, tmp_path: Path) -> None:
    """SDXL: original size as (height, width), crop as (top, left), and the bucket's size."""
    teacher = load_teacher(str(folders["sdxl"]))
    config = config_for(shapes_folder, tmp_path / "cache", buckets=("32x32", "40x24", "24x40"))
    dataset = LatentDataset([prepared(str(shapes_folder), config, teacher, 0)], [None])
    order = SampleOrder(len(dataset), 0, 4, dataset.shapes)
    for step in range(10):
        indices = order.indices(step, range(4))
        mean, _, cond, _ = dataset.read(indices)
        height, width = (side * 4 for side in mean.shape[2:])
        for original_height, original_width, top, left, *target in cond["time_ids"].tolist():
            assert target == [height, width]
            assert (original_width, original_height) in SIZES
            scale = max(height / original_height, width / original_width)
            middle = [(original_height * scale - height) / 2, (original_width * scale - width) / 2]
            assert np.abs(np.array([top, left]) - middle).max() <= 1


def test_what_a_teacher_generates_counts_as_square(
    folders: dict[str, Path], shapes_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    teacher, sources = load_teacher(str(folders["sd1"])), (str(shapes_folder), "teacher")
    config = config_for(
        shapes_folder, tmp_path / "cache", sources=sources, prompts=str(tmp_path / "prompts.txt"), teacher_steps=1
    )
    dataset = LatentDataset([prepared(spec, config, teacher, 0) for spec in sources], [None, None])
    assert dataset.shapes[-2:] == [(16, 16)] * 2
    assert Counter(dataset.shapes)[16, 16] == 6
    assert dataset.reports[1].buckets == ()


SHAPES: list[Shape] = [[(8, 8), (4, 16), (16, 4)][i % 7 % 3] for i in range(50)]
"of 50 samples: 22, 14 and 14"


@pytest.mark.parametrize("batch", [4, 7, 64])
def test_every_step_has_one_shape_and_every_sample_its_turn(batch: int) -> None:
    order = SampleOrder(50, 3, batch, SHAPES)
    steps = [order.indices(step, range(batch)) for step in range(600)]
    visited: dict[Shape, list[int]] = {shape: [] for shape in SHAPES}
    for indices in steps:
        (shape,) = {SHAPES[index] for index in indices}
        visited[shape] += indices
    for shape, indices in visited.items():
        members = [i for i, own in enumerate(SHAPES) if own == shape]
        epochs = [indices[i : i + len(members)] for i in range(0, len(indices) - len(members) + 1, len(members))]
        assert all(sorted(epoch) == members for epoch in epochs)  # each once, and none is left out at an epoch's end
        assert len({tuple(epoch) for epoch in epochs}) > 0.9 * len(epochs)
        # Its share of the samples: at no time more than a step and a round away.
        share, done = len(members) / 50, 0
        for step, some in enumerate(steps, 1):
            done += len(some) if SHAPES[some[0]] == shape else 0
            assert abs(done - share * step * batch) <= 50 + 2 * batch


def test_the_order_is_that_of_one_process_however_a_step_is_cut() -> None:
    whole = [SampleOrder(50, 3, 12, SHAPES).indices(step, range(12)) for step in range(40)]
    assert [SampleOrder(50, 3, 12, SHAPES).indices(step, range(12)) for step in range(25, 40)] == whole[25:]
    back = SampleOrder(50, 3, 12, SHAPES)
    assert [back.indices(step, range(12)) for step in reversed(range(40))] == whole[::-1]
    cut = SampleOrder(50, 3, 12, SHAPES)  # two processes of two micro-batches
    parts = [[cut.indices(step, range(i, i + 3)) for i in range(0, 12, 3)] for step in range(40)]
    assert [[index for part in each for index in part] for each in parts] == whole
    assert SampleOrder(50, 4, 12, SHAPES).indices(0, range(12)) != whole[0]
    plain, alike = SampleOrder(50, 3, 12), SampleOrder(50, 3, 12, [(8, 8)] * 50)
    assert [plain.indices(s, range(12)) for s in range(40)] == [alike.indices(s, range(12)) for s in range(40)]


def test_a_shape_of_one_sample_has_its_share() -> None:
    order = SampleOrder(10, 0, 4, [(8, 8)] * 9 + [(4, 16)])
    steps = [order.indices(step, range(4)) for step in range(100)]
    assert steps.count([9] * 4) == 10


def settings(teacher: Path, data: Path, folder: Path, **options: Any) -> Any:
    own = {**SMALL, "teacher.model": str(teacher), "data.sources": (str(data),), "run.output": str(folder)}
    own |= {"data.resolution": 32, "data.buckets": ("auto",), "data.cache_dir": str(folder.parent / "cache")}
    return resolve({}, {**own, "optim.max_train_steps": 4, **options})


def weights(run: Path) -> dict[str, torch.Tensor]:
    from lcmdistill.utils.checkpoint import load_checkpoint
    from lcmdistill.utils.run_dir import checkpoints

    groups, _ = load_checkpoint(checkpoints(run / "checkpoints")[-1])
    return {f"{group}.{key}": value for group, tensors in groups.items() for key, value in tensors.items()}


def test_a_run_resumes_bit_for_bit_and_does_not_care_how_a_step_is_cut(
    folders: dict[str, Path], shapes_folder: Path, tmp_path: Path
) -> None:
    whole = distill(settings(folders["sd1"], shapes_folder, tmp_path / "whole"))
    for steps in (2, 4):
        halves = distill(
            settings(folders["sd1"], shapes_folder, tmp_path / "halves", **{"optim.max_train_steps": steps})
        )
    expected, found = weights(whole), weights(halves)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    cut = {"optim.batch_size": 2, "optim.gradient_accumulation_steps": 2}
    parts = weights(distill(settings(folders["sd1"], shapes_folder, tmp_path / "parts", **cut)))
    off = [float((parts[key] - value).norm() / value.norm()) for key, value in expected.items() if key[:7] == "student"]
    assert max(off) < 1e-2  # rounding, which Adam makes steps of where a gradient is next to nothing


@pytest.mark.parametrize("family", ["sdxl", "inpainting", "pixart"])
def test_every_family_learns_from_every_shape(
    family: str, folders: dict[str, Path], shapes_folder: Path, tmp_path: Path, command: Command
) -> None:
    left_out = ("objective.w_min", "objective.w_max") if family == "pixart" else ()
    sets = [f"--set={key}={value}" for key, value in {**SMALL, "data.resolution": 32}.items() if key not in left_out]
    base = ["distill", "--teacher", folders[family], "--data", shapes_folder, "--output", tmp_path / "run", *sets]
    code, output, error = command(*base, "--buckets", "auto", "--max-train-steps", 6)
    assert (code, error) == (0, ""), error
    assert "20 kept, 0 dropped; " in output
    assert "at 32x32" in output
    code, _, error = command(*base, "--max-train-steps", 7)
    assert (code, "data.buckets" in error) == (2, True)  # other samples in another order


def test_the_memory_is_that_of_the_largest(folders: dict[str, Path], shapes_folder: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(folders["sd1"]))
    needed = [
        step_memory(
            settings(folders["sd1"], shapes_folder, tmp_path, **{"data.buckets": which}), teacher, torch.float32
        )
        for which in (None, ("32x64",), ("16x32",))
    ]
    square, larger, smaller = (each.activations for each in needed)
    assert (larger > 1.5 * square, smaller == square) == (True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.buckets": ("auto", "64x32")}, "data.buckets is auto, 64x32; use either auto or sizes"),
        ({"data.buckets": ("square",)}, "data.buckets is 'square'; it must be auto, or sizes as HEIGHTxWIDTH"),
        ({"data.buckets": ("32x33",)}, "its sides must be multiples of 8: try 32x32"),
        ({"data.buckets": ("0x32",)}, "its sides must be multiples of 8: try 8x32"),
        ({"data.sources": ("teacher",)}, "--data teacher generates squares"),
    ],
)
def test_buckets_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, folders: dict[str, Path], shapes_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        validate_for_teacher(
            settings(folders["sd1"], shapes_folder, tmp_path, **options), load_teacher(str(folders["sd1"]))
        )


def test_a_dry_run_tells_the_buckets(
    folders: dict[str, Path], shapes_folder: Path, tmp_path: Path, command: Command
) -> None:
    base = ["distill", "--teacher", folders["sd1"], "--data", shapes_folder, "--resolution", 32, "--buckets", "auto"]
    code, output, error = command(*base, "--output", tmp_path / "run", "--dry-run")
    assert (code, "4 at 32x32" in output) == (0, True), error


@pytest.mark.parametrize(("family", "tokens"), [("sd1", 77), ("sdxl", 77), ("pixart", 120)])
def test_captions_that_are_cut_are_counted(family: str, tokens: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """A token a letter, and its marks: of CLIP two, of T5 an end and a space."""
    teacher = load_teacher(str(folders[family]))
    lengths = [tokens - 2, tokens - 1, tokens, 3 * tokens]
    pictures = [(f"{i}.png", encoded(picture(i))) for i in range(4)]
    captions = [(f"{i}.txt", ("a" * n).encode()) for i, n in enumerate(lengths)]
    data = write_tar(tmp_path / "data.tar", sorted(pictures + captions))
    config = config_for(data, tmp_path / "cache", buckets=None)
    (looked,) = surveyed(config, seconds=60, rejects=teacher.rejects, teacher=teacher)
    for _ in range(2):  # a later run reads it from the chunk
        (report,) = LatentDataset([prepared(str(data), config, teacher, 0)], [None]).reports
        assert (report.cut, report.tokens) == (looked.cut, looked.tokens) == (3, tokens)
        assert f"3 captions are truncated to {tokens} tokens" in str(report)


def test_a_long_prompt_is_reported_once_when_sampling(small_run: Path, tmp_path: Path, command: Command) -> None:
    base = ["sample", small_run, "--steps", 1, "--output", tmp_path / "out", "--prompt", "a cat"]
    assert "tokens" not in command(*base)[1]
    _, output, error = command(*base, "--prompt", "x" * 100, "--num-images", 3)
    assert (output.count("1 of the prompts are longer than the 77 tokens"), error) == (1, "")


def test_compiling_pays_where_each_shape_has_steps_enough() -> None:
    gpu = torch.device("cuda")
    assert [
        should_compile("auto", gpu, steps, 7) for steps in (REPAID_AFTER, 7 * REPAID_AFTER - 1, 7 * REPAID_AFTER)
    ] == [
        False,
        False,
        True,
    ]
    assert (
        should_compile("auto", gpu, REPAID_AFTER),
        should_compile("on", gpu, 1, 7),
        should_compile("off", gpu, 10**6),
    ) == (True, True, False)
    assert (should_compile("auto", gpu, 10**6, adapter=True), should_compile("on", gpu, 1, adapter=True)) == (
        False,
        True,
    )
