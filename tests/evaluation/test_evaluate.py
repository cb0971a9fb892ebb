"""`lcmdistill evaluate`: what a sweep generates, writes, skips and rejects, and how it ranks students of known quality."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from lcmdistill.config.resolve import with_values
from lcmdistill.evaluation import evaluate as program
from lcmdistill.evaluation import sweep
from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions, evaluated_run
from lcmdistill.evaluation.prompts import choose_prompts
from lcmdistill.evaluation.results import Results
from lcmdistill.utils.errors import UsageError
from tests.support.evaluated import noise_weights, results_of, shorten_references
from tests.support.finished_runs import finished_run

OPTIONS: dict[str, Any] = {"steps": (1, 2), "guidance_scales": (4.0, 2.0), "num_images": 5, "device": "cpu"}

Evaluated = Callable[..., Results]


@pytest.fixture(scope="module", autouse=True)
def _kid_of_few_images() -> Iterator[None]:
    """Compute KID from few images, which are generated in less time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lcmdistill.evaluation.metrics.features.MIN_KID_IMAGES", 2)
        yield


@pytest.fixture
def evaluated(tmp_path: Path, small_run: Path, small_features: Path, image_folder: Path) -> Evaluated:
    """Evaluate a copy of the small run, tmp_path / name, with some options changed."""

    def evaluated(name: str = "run", **changes: Any) -> Results:
        run = tmp_path / name
        if not run.is_dir():
            shutil.copytree(small_run, run)
        given = {**OPTIONS, "features": small_features, "real": str(image_folder), **changes}
        evaluate([run], EvaluationOptions(**given))
        return results_of(run)

    return evaluated


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, small_run: Path, small_features: Path, image_folder: Path) -> Path:
    """A copy of the small run that is evaluated with OPTIONS. Tests copy it or only read it."""
    run = shutil.copytree(small_run, tmp_path_factory.mktemp("swept") / "run")
    evaluate([run], EvaluationOptions(**OPTIONS, features=small_features, real=str(image_folder)))
    return run


def numbers_of(results: Results) -> dict[str, Any]:
    """Return all numbers of a sweep except times."""
    return {name: point["numbers"] for name, point in results.points.items()}


def test_a_sweep_has_a_point_for_each_combination(swept: Path):
    found = results_of(swept)
    expected = {f"student-{n:02d}-g{g}" for n in (1, 2) for g in (2, 4)} | {"teacher-50-g4", "teacher-50-g2"}
    expected |= {f"{sampler}-{n:02d}-g4" for sampler in ("teacher", "trailing") for n in (1, 2)}
    assert set(found.points) == expected
    assert list(found.metrics)[:3] == ["kid_teacher", "precision", "recall"]
    assert set(found.metrics) == {
        "rmse",
        "ssim",
        "sharpness",
        "saturation",
        "diversity",
        "kid",
        *list(found.metrics)[:3],
    }
    assert found.guidance_scale == 4.0
    full = found.points["teacher-50-g4"]["numbers"]
    assert (full["rmse"], full["ssim"]) == (0.0, 1.0)
    assert full["sharpness"] == full["saturation"] == full["diversity"] == 1.0
    for point in found.points.values():
        assert point["images"] == 5
        assert set(point["numbers"]) == set(found.metrics)
        assert set(point["standard_errors"]) == {"kid", "kid_teacher"}
        assert point["seconds_per_image"] > 0
        assert point["conditions"].startswith("batches of 5 on cpu, ")
    assert len(found.previews("student", 1, 4.0)) == 5


def test_every_metric_is_described(swept: Path):
    kid = results_of(swept).metrics["kid"]
    assert kid["label"] == "KID (small)"
    assert (kid["measured_on"], kid["published"]) == ("small, 8 features", "not comparable")
    assert kid["compared_with"].startswith("10 real images of ")
    for name, metric in results_of(swept).metrics.items():
        assert metric["better"] in ("lower", "higher", "one")
        assert all(metric[key] for key in ("label", "description", "measured_on", "compared_with", "published")), name


def test_a_second_sweep_generates_nothing_and_gives_the_same_numbers(
    evaluated: Evaluated, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = results_of(shutil.copytree(swept, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "sweep.json"}
    for name in ("student_latents", "teacher_latents"):
        monkeypatch.setattr(sweep, name, lambda *args, **options: pytest.fail("generated again"))
    again = evaluated()
    assert numbers_of(again) == numbers_of(first)
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "sweep.json"} == before


def test_numbers_repeat_and_do_not_depend_on_the_batch_size(
    evaluated: Evaluated, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With equal batches every digit repeats. With others, sums are added up in another order and agree to rounding."""
    shorten_references(monkeypatch)
    found, latents = [], []
    for name, batch_size in (("three", 3), ("again", 3), ("one", 1), ("two", 2)):
        if name in ("three", "one"):  # so that the teacher's batches differ too
            with_own_cache(small_run, tmp_path / name, tmp_path / f"cache-{name}")
        results = evaluated(name, batch_size=batch_size, guidance_scales=(4.0,), num_images=3)
        found.append(numbers_of(results))
        paths = sorted((results.folder / "latents").glob("*.safetensors"))
        latents.append(torch.stack([load_file(path)["latents"] for path in paths]))
    assert found[0] == found[1]
    for other in found[2:]:
        for name, numbers in found[0].items():
            assert other[name] == pytest.approx(numbers, rel=0.011, abs=0.0011), name
    assert torch.equal(latents[0], latents[1])
    scale = float(latents[0].abs().max())
    assert max(float((other - latents[0]).abs().max()) for other in latents[2:]) < 1e-4 * scale


def test_an_interrupted_sweep_resumes(
    evaluated: Evaluated, swept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = numbers_of(results_of(swept))
    generate, calls = sweep.student_latents, []

    def cut_off(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options["steps"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "student_latents", cut_off)
        with pytest.raises(KeyboardInterrupt):
            evaluated("cut")
    points = tmp_path / "cut" / "evaluation" / "points"
    assert sorted(path.name for path in points.iterdir()) == ["student-01-g4", "teacher-50-g4"]
    first = (points / "student-01-g4" / "numbers.json").stat().st_mtime_ns
    assert numbers_of(evaluated("cut")) == whole
    assert (points / "student-01-g4" / "numbers.json").stat().st_mtime_ns == first


def with_own_cache(small_run: Path, run: Path, cache: Path) -> None:
    """Copy the small run and give it a cache of its own, so that it shares no teacher latents."""
    shutil.copytree(small_run, run)
    lines = [line for line in (run / "config.toml").read_text().splitlines() if not line.startswith("cache_dir")]
    text = "\n".join([*lines, "# checksum: any"]).replace("[data]", f'[data]\ncache_dir = "{cache}"')
    (run / "config.toml").write_text(text)


def test_damaged_files_are_made_again(evaluated: Evaluated, small_run: Path, tmp_path: Path):
    """Half a file of latents, of numbers and of the curve, as a full disk or a power cut may leave."""
    with_own_cache(small_run, tmp_path / "run", tmp_path / "cache")
    first = evaluated(guidance_scales=(4.0,), num_images=2)
    numbers, points = numbers_of(first), first.consistency
    kept = [*(first.folder / "latents").iterdir(), *(tmp_path / "cache" / "evaluation").iterdir()]
    assert len(kept) > 7
    kept += [first.folder / "points" / "student-02-g4" / "numbers.json", first.folder / "consistency.json"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    (first.folder / "points" / "teacher-50-g4" / "numbers.json").unlink()
    again = evaluated(guidance_scales=(4.0,), num_images=2)
    assert (numbers_of(again), again.consistency) == (numbers, points)


def test_too_many_steps_are_refused_before_anything_is_generated(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "teacher_latents", lambda *args, **options: pytest.fail("generated"))
    with pytest.raises(UsageError, match="--steps is 60; this model's scheduler has 50"):
        evaluated(steps=(2, 60))


@pytest.mark.usefixtures("swept")
def test_teacher_latents_serve_every_run(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "evict_lru", evict := Mock())
    monkeypatch.setattr(sweep, "teacher_latents", lambda *args, **options: pytest.fail("generated again"))
    evaluated("two")
    cache, limit, needed = evict.call_args.args
    assert (limit, {path.parent for path in needed if path.is_file()}) == (200e9, {cache / "evaluation"})
    assert len(needed) == len(set(needed)) == 1 + 2 + 4  # a trajectory, two guidance scales, few steps


def test_other_weights_are_sampled_again(evaluated: Evaluated, swept: Path, tmp_path: Path):
    first = numbers_of(results_of(shutil.copytree(swept, tmp_path / "run")))
    noise_weights(tmp_path / "run", 0.3)
    second = numbers_of(evaluated())
    assert second["teacher-50-g4"] == first["teacher-50-g4"]
    assert second["student-02-g4"] != first["student-02-g4"]
    assert len(list((tmp_path / "run" / "evaluation" / "latents").iterdir())) == 4


def test_prompts_are_spread_over_the_file_and_trained_ones_left_out(
    small_run: Path, small_teacher: Path, tmp_path: Path
):
    from lcmdistill.teachers.loading import load_teacher

    each, teacher = evaluated_run(small_run), load_teacher(str(small_teacher))
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "trained.txt").write_text("b\nc\n")

    def chosen(count: int, **config: Any) -> tuple[str, ...]:
        options = EvaluationOptions(prompts=str(tmp_path / "p.txt"), num_images=count)
        other = EvaluatedRun(each.run, with_values(each.config, config), each.model)
        return choose_prompts([other], options, teacher).prompts

    own: dict[str, Any] = {"data.sources": ("teacher",), "data.prompts": str(tmp_path / "trained.txt")}
    assert chosen(2) == ("a", "c")
    assert chosen(6) == ("a", "b", "c", "d", "a", "b")
    assert chosen(2, **own) == ("a", "d")
    both = [EvaluatedRun(each.run, with_values(each.config, more), each.model) for more in ({}, own)]
    options = EvaluationOptions(prompts=str(tmp_path / "p.txt"), num_images=2)
    assert choose_prompts(both, options, teacher).prompts == ("a", "d")  # held out of the one and the other
    (tmp_path / "trained.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(UsageError, match="was trained on all of these prompts"):
        chosen(2, **own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"inception": Path("x.pt")},
            "10000 images because its bias dominates below, and --num-images is 5",
        ),
        ({"features": Path("x.pt")}, "--features x.pt does not exist"),
        ({"scorers": {"clip": "no/such"}}, "--scorer clip=no/such is neither a local path nor in the local hub cache"),
        ({"eta": 0.0}, "--eta is for a TCDScheduler, and this model has LCMScheduler; remove this option"),
        ({"lpips": Path("x.pth")}, "--lpips x.pth does not exist; pass torchvision's file"),
        ({"real": "/nowhere"}, "--real /nowhere does not exist; pass a folder of images, .tar shards, or tiny"),
    ],
)
def test_impossible_metrics_are_refused_in_one_sentence(evaluated: Evaluated, options: Any, message: str):
    with pytest.raises(Exception, match=message) as caught:
        evaluated(**options)
    assert "\n" not in str(caught.value)


def test_baked_guidance_cannot_be_changed(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = finished_run(small_teacher, "lora", tmp_path / "lora")
    monkeypatch.setattr(program, "_evaluate_run", lambda *args: None)
    own = evaluated_run(run).guidance_scale
    for scales, reported in (((), False), ((own,), False), ((9.5,), True)):
        evaluate([run], EvaluationOptions(guidance_scales=scales, device="cpu"))
        assert (f"its guidance scale, {own:g}, is in its weights" in capsys.readouterr().out) == reported


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path, small_run: Path):
    with pytest.raises(UsageError, match="is not a run folder"):
        evaluate([tmp_path], EvaluationOptions())
    (tmp_path / "config.toml").write_bytes((small_run / "config.toml").read_bytes())
    with pytest.raises(UsageError, match="has not finished"):
        evaluate([tmp_path], EvaluationOptions())
