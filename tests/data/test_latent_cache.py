"""Data: what each source yields, what is kept and why the rest is not, the transforms, the cache, and the order."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data import chunks
from lcmdistill.data import latent_cache as cache
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import mark_complete
from lcmdistill.data.sampler import SampleOrder, epoch_order
from lcmdistill.data.sources.registry import make_source, make_sources
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.survey import unused_samples, usable_count
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import cache_of, config_for, contents, good, picture, pixels, prepared, surveyed, write_tar


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 4)


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
    folder = prepared(spec, config, teacher, 0)
    assert counting.images == 10
    assert list(contents(folder)) == [
        "00000000-00000004.safetensors",
        "00000004-00000008.safetensors",
        "00000008-00000011.safetensors",
    ]
    before = contents(folder)
    assert prepared(spec, config, teacher, 0) == folder
    assert (counting.images, contents(folder)) == (10, before)
    dataset = LatentDataset([folder], [None])
    assert (len(dataset), dataset.reports[0].kept, dataset.reports[0].rejected) == (10, 10, (("no image", 1),))


def test_progress_is_reported_within_a_chunk(
    tmp_path: Path, teacher: Teacher, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "PIXELS_PER_BATCH", 4 * 16**2)
    done: list[float] = []
    prepared(spec, config_for(spec, tmp_path / "cache"), teacher, 0, on_progress=done.append)
    assert done[:11] == [i / 2 for i in range(11)]  # each of eleven members that is read
    assert (len(done), done[11], done[-1]) == (11 + 4, 5.5, 11)  # ten samples four at a time, and the chunk's end
    assert done == sorted(done)


def test_an_interrupted_preparation_goes_on_where_it_stopped(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(prepared(spec, config_for(spec, tmp_path / "whole"), teacher, 0))
    counting, config = Counting(teacher, monkeypatch), config_for(spec, tmp_path / "cache")

    def stop(done: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(spec, config, teacher, 0, on_progress=stop)
    assert counting.images == 7
    folder = prepared(spec, config, teacher, 0)
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
        prepared(spec, config, teacher, 0)
    assert contents(cache_of(spec, config, teacher, 0)) == {}


@pytest.mark.parametrize("source", ["shard", "teacher"])
def test_two_ranks_prepare_what_one_does(
    tmp_path: Path, teacher: Teacher, spec: str, source: str, small_chunks: None
) -> None:
    options: dict[str, Any] = {}
    if source == "teacher":
        (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
        spec, options = "teacher", {"prompts": str(tmp_path / "prompts.txt"), "max_samples": 10, "teacher_steps": 2}
    one = prepared(spec, config_for(spec, tmp_path / "one", **options), teacher, 0)
    config = config_for(spec, tmp_path / "two", **options)
    shares = []
    for rank in (0, 1):
        before = set(contents(cache_of(spec, config, teacher, 0))) if rank else set()
        folder = prepared(spec, config, teacher, 0, rank=rank, world=2)
        shares.append(set(contents(folder)) - before)
    assert [len(share) for share in shares] == [2, 1]
    assert contents(folder) == contents(one)


def test_what_shapes_the_latents_is_in_the_key(tmp_path: Path, teacher: Teacher, spec: str) -> None:
    config = config_for(spec, tmp_path / "cache")

    def key(config: DataConfig = config, seed: int = 0, teacher: Teacher = teacher, spec: str = spec) -> Path:
        return cache_of(spec, config, teacher, seed)

    assert key(seed=1) == key()  # nothing is drawn
    assert (
        key(replace(config, caption_drop=0.5, max_samples=3, guidance_scale=2.0)) == key()
    )  # nothing of it is encoded
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
        key(replace(drawn, teacher_steps=3), spec="teacher"),
    ]
    (tmp_path / "prompts.txt").write_text("a cat")
    changed.append(key(replace(drawn, prompts=str(tmp_path / "prompts.txt")), spec="teacher"))
    Path(spec).write_bytes(Path(spec).read_bytes() + b"\0" * 512)
    changed.append(key())
    assert len(set(changed)) == len(changed)


def test_the_teacher_is_in_the_key(tmp_path: Path, teacher: Teacher, small_teacher: Path, spec: str) -> None:
    config = config_for(spec, tmp_path / "cache")
    keys = {name: cache_of(name, config, teacher, 0) for name in (spec, "teacher")}

    def changed(file: str, **values: Any) -> dict[str, bool]:
        """Whether a teacher with another config has other keys, for images and for its own draws."""
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(small_teacher, folder)
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        other = load_teacher(str(folder))
        return {name: cache_of(name, config, other, 0) != keys[name] for name in keys}

    assert changed("vae/config.json") == {spec: False, "teacher": False}  # the same elsewhere is the same
    assert changed("vae/config.json", scaling_factor=0.25) == {spec: True, "teacher": True}
    scheduler = "scheduler/scheduler_config.json"
    assert changed(scheduler, prediction_type="v_prediction") == {spec: False, "teacher": True}
    assert changed(scheduler, beta_end=0.02) == {spec: False, "teacher": True}


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_the_weights_are_in_the_key(tmp_path: Path, small_teacher: Path, spec: str, part: str) -> None:
    config, teacher = config_for(spec, tmp_path / "cache"), load_teacher(str(small_teacher))
    before = [cache_of(name, config, teacher, 0) for name in (spec, "teacher")]
    next(getattr(teacher.pipeline, part).parameters()).data.view(-1)[0] += 1
    after = [cache_of(name, config, teacher, 0) for name in (spec, "teacher")]
    # the network has no part in latents of images
    assert [a != b for a, b in zip(before, after, strict=True)] == [part != "unet", True]


def test_the_values_are_the_vae_s_posterior_and_the_text_encoder_s(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None
) -> None:
    config = config_for(spec, tmp_path / "cache")
    dataset = LatentDataset([prepared(spec, config, teacher, 0)], [None])
    mean, std, cond, _ = dataset.read([7, 0])
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
        monkeypatch.setattr(chunks, "PIXELS_PER_BATCH", at_once * 16 * 16)
        config = config_for(
            "teacher", tmp_path / str(at_once), prompts=str(tmp_path / "prompts.txt"), max_samples=7, teacher_steps=3
        )
        shares: list[float] = []
        dataset = LatentDataset([prepared("teacher", config, teacher, 0, on_progress=shares.append)], [7])
        assert len(dataset) == 7  # the prompts go round
        assert shares == sorted(shares)  # each of the three steps moves it
        assert {round(at_once / 3, 6), round(2 * at_once / 3, 6), 7} <= {round(share, 6) for share in shares}
        found.append(dataset.read(range(7)))
    (mean, std, cond, _), (other_mean, _, other_cond, _) = found
    torch.testing.assert_close(mean, other_mean, rtol=2e-3, atol=2e-3)
    assert torch.equal(cond["prompt_embeds"], other_cond["prompt_embeds"])
    assert bool((std == 0).all())
    assert torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][3])  # the same prompt again ...
    assert (mean[0] - mean[3]).abs().max() > 0.1  # ... on other noise
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(chunks.derive_seed(0, "draw", 2)))
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 7.5, "scheduler": "DPMSolverMultistepScheduler"}
    drawn = teacher.generate_latents(["a cow"], noise[None], **options)
    torch.testing.assert_close(mean[2:3], drawn, rtol=2e-3, atol=2e-3)


def test_a_larger_count_adds_to_a_smaller_one(tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None) -> None:
    config = config_for(spec, tmp_path / "cache")
    lengths = {}
    for count in (3, 11, 6):
        folder = prepared(spec, replace(config, max_samples=count), teacher, 0)
        lengths[count] = len(LatentDataset([folder], [count]))
    assert lengths == {3: 3, 11: 10, 6: 5}  # the sixth member is a bad one
    assert len(LatentDataset([folder], [3])) == 3
    few = LatentDataset([folder], [6]).read(range(5))[0]
    torch.testing.assert_close(few, LatentDataset([folder], [11]).read(range(5))[0], rtol=2e-3, atol=1e-4)


def test_members_that_were_removed_from_a_cache_are_missed(
    tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None
) -> None:
    """By a run that made room, or by hand: fewer samples than were asked for must not go unnoticed."""
    config = replace(config_for(spec, tmp_path / "cache"), max_samples=11)
    folder = prepared(spec, config, teacher, 0)
    mark_complete(folder, 11)
    for lost in (0, 1):
        sorted(folder.glob("*.safetensors"))[lost].unlink()
        with pytest.raises(RunError, match=r"were deleted while this run filled it.*raise data\.cache_limit"):
            mark_complete(folder, 11)
        assert len(LatentDataset([prepared(spec, config, teacher, 0)], [11])) == 10
        mark_complete(folder, 11)


def test_files_of_other_names_are_no_chunks(tmp_path: Path, teacher: Teacher, spec: str, small_chunks: None) -> None:
    config = config_for(spec, tmp_path / "cache")
    folder = prepared(spec, config, teacher, 0)
    for name in ("00000000-00000004 (copy)", "0-4", "00000000", "notes"):
        shutil.copy(folder / "00000000-00000004.safetensors", folder / f"{name}.safetensors")
    assert len(LatentDataset([prepared(spec, config, teacher, 0)], [None])) == 10


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
        return [str(member.caption) for member in make_source(str(data), seed=seed).members()]

    assert order(None) == names
    assert sorted(order(0)) == names
    assert len({tuple(order(seed)) for seed in (None, 0, 1)}) == 3
    assert order(0) == order(0)
    tens = Counter(name[1] for name in order(0)[:50])
    assert len(tens) == 10  # from every part of the listing
    config = config_for(str(data), tmp_path / "cache")
    assert cache_of(str(data), config, teacher, 0) != cache_of(str(data), config, teacher, 1)
    counting = Counting(teacher, monkeypatch)
    few = contents(prepared(str(data), replace(config, max_samples=8), teacher, 0))
    assert counting.images == 8
    many = contents(prepared(str(data), replace(config, max_samples=20), teacher, 0))
    assert counting.images == 20
    assert many.items() > few.items()


def test_what_a_count_excludes_is_reported(tmp_path: Path, spec: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        picture(i).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a")

    def note(spec: Path | str, count: int | None) -> str:
        config = DataConfig(sources=(str(spec),), resolution=16, max_samples=count)
        return unused_samples(make_source(str(spec)), config, surveyed(config, seconds=60)[0])

    why = "used (data.max_samples, by default as many as the steps of a run can use)"
    assert note(data, 2) == f"; 2 of 3 {why}"
    assert note(spec, 6) == f"; the first 6 {why}"  # nobody knows how many there are
    assert note("teacher", 5) == f"; 5 of {len(read_prompts(None))} {why}"
    assert {note(data, 3), note(data, None), note(spec, 100), note("teacher", 3000)} == {""}
    config = DataConfig(sources=("teacher",), resolution=16, max_samples=5)
    report = surveyed(config, seconds=60)[0]
    assert unused_samples(make_source("teacher"), config, report, takes_prompts=False) == "", (
        "there is nothing to take from"
    )


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
    folders = [prepared(each, config_for(each, tmp_path / "cache"), teacher, 0) for each in (spec, other)]
    dataset = LatentDataset(folders, [None, None])
    assert len(dataset) == 11
    assert torch.equal(dataset.read([10])[0], LatentDataset(folders[1:], [None]).read([0])[0])


def test_a_source_without_anything_usable_is_given_up(
    tmp_path: Path, teacher: Teacher, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "GIVE_UP_AFTER", 8)
    spec = str(write_tar(tmp_path / "bad.tar", [(f"{i}.txt", b"a") for i in range(100)]))
    with pytest.raises(UsageError, match=r"none of 8 samples can be used \(8 x no image\)"):
        prepared(spec, config_for(spec, tmp_path / "cache"), teacher, 0)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, small_teacher: Path, spec: str) -> None:
    teacher = load_teacher(str(small_teacher))
    next(teacher.vae.parameters()).data.fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        prepared(spec, config_for(spec, tmp_path / "cache"), teacher, 0)


@pytest.mark.parametrize(
    ("sources", "needed", "count"),
    [(("teacher",), 100, 128), (("teacher",), 10**6, None), (("tiny",), 10**6, 10**6), (("tiny", "teacher"), 129, 256)],
)
def test_no_more_is_prepared_than_a_run_can_use(sources: tuple[str, ...], needed: int, count: int | None) -> None:
    expected = len(read_prompts(None)) if count is None else -(-count // 128) * 128
    made = make_sources(DataConfig(sources=sources))
    assert usable_count(DataConfig(), made, needed) == expected
    assert usable_count(DataConfig(max_samples=7), made, needed) == 7


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
