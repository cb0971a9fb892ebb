"""`lcmdistill evaluate`: what a sweep generates, writes, skips and rejects, and how it ranks students of known quality."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.config.resolve import with_values
from lcmdistill.evaluation import evaluate as program
from lcmdistill.evaluation import results as results_module
from lcmdistill.evaluation import self_consistency, sweep
from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.metrics.base import ImagePair
from lcmdistill.evaluation.metrics.basic import BASIC_METRICS
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions, evaluated_run
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.utils.errors import UsageError
from tests.support.finished_runs import finished_run
from tests.support.runs import distill, resolve

OPTIONS: dict[str, Any] = {"steps": (1, 2), "guidance_scales": (4.0, 2.0), "num_images": 5, "device": "cpu"}

Evaluated = Callable[..., Results]


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


def results_of(run: Path) -> Results:
    results = read_results(run)
    assert results is not None
    return results


def numbers_of(results: Results) -> dict[str, Any]:
    """Return all numbers of a sweep except times."""
    return {name: cell["numbers"] for name, cell in results.cells.items()}


def test_a_sweep_has_a_point_for_each_combination(swept: Path):
    found = results_of(swept)
    expected = {f"student-{n:02d}-g{g}" for n in (1, 2) for g in (2, 4)} | {"teacher-50-g4", "teacher-50-g2"}
    expected |= {f"{sampler}-{n:02d}-g4" for sampler in ("teacher", "trailing") for n in (1, 2)}
    assert set(found.cells) == expected
    assert found.guidance_scale == 4.0
    full = found.cells["teacher-50-g4"]["numbers"]
    assert (full["rmse"], full["ssim"]) == (0.0, 1.0)
    assert full["sharpness"] == full["saturation"] == full["diversity"] == 1.0
    for cell in found.cells.values():
        assert cell["images"] == 5
        assert set(cell["numbers"]) == {"rmse", "ssim", "sharpness", "saturation", "diversity", "kid", "kid_teacher"}
        assert cell["seconds_per_image"] > 0
        assert cell["conditions"].startswith("batches of 5 on cpu, ")
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
    cells = tmp_path / "cut" / "evaluation" / "cells"
    assert sorted(path.name for path in cells.iterdir()) == ["student-01-g4", "teacher-50-g4"]
    first = (cells / "student-01-g4" / "numbers.json").stat().st_mtime_ns
    assert numbers_of(evaluated("cut")) == whole
    assert (cells / "student-01-g4" / "numbers.json").stat().st_mtime_ns == first


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
    kept += [first.folder / "cells" / "student-02-g4" / "numbers.json", first.folder / "consistency.json"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    (first.folder / "cells" / "teacher-50-g4" / "numbers.json").unlink()
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


def noise_weights(run: Path, size: float) -> None:
    """Add noise to every weight of a run's student, of `size` times the weight's standard deviation."""
    path = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if value.numel() > 1:
            tensors[name] = value + size * value.std() * torch.randn(value.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    (run / "pipeline" / ".checksums.json").unlink()


def shorten_references(patched: pytest.MonkeyPatch) -> None:
    """Let the references take 12 steps instead of 50, and the self-consistency curve have 3 points of 2 images."""
    for module in (sweep, results_module):
        patched.setattr(module, "TEACHER_STEPS", 12)
    patched.setattr(self_consistency, "POINTS", 3)
    patched.setattr(self_consistency, "IMAGES", 2)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """Results of the tiny teacher's untrained student, which is the teacher, and of one with noise in its weights.

    The guidance scale is 1, so the student only has to learn to take large steps.
    """
    folder, found = tmp_path_factory.mktemp("ranked"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LCMDISTILL_CACHE", str(folder / "cache"))
        settings: dict[str, Any] = {
            "teacher.model": "tiny",
            "run.output": str(folder / "equal"),
            "run.validate_every": 0,
        }
        settings |= {
            "optim.learning_rate": 0.0,
            "optim.max_train_steps": 1,
            "optim.batch_size": 1,
            "data.max_samples": 16,
        }
        distill(resolve({}, {**settings, "run.device": "cpu"}))
        shutil.copytree(folder / "equal", folder / "broken")
        noise_weights(folder / "broken", 0.4)
        patched.setattr("lcmdistill.evaluation.select.MIN_KID_IMAGES", 8)
        shorten_references(patched)
        for name in ("equal", "broken"):
            evaluate([folder / name], EvaluationOptions(steps=(4,), guidance_scales=(1.0,), num_images=8, device="cpu"))
            found.append(results_of(folder / name))
    return found[0], found[1]


@pytest.mark.parametrize("measure", ["rmse", "ssim", "sharpness", "saturation", "diversity", "kid", "kid_teacher"])
def test_an_untrained_student_is_ranked_above_a_broken_one(ranked: tuple[Results, Results], measure: str):
    equal, broken = (results.number(measure, "student", 4) for results in ranked)
    assert equal is not None
    assert broken is not None
    better = ranked[0].metrics[measure]["better"]
    if better == "one":
        assert abs(equal - 1) < 0.5 * abs(broken - 1)
    else:
        assert equal < 0.7 * broken if better == "lower" else equal > 1.3 * broken


def blurred(pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)


def washed_out(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.lerp(pixels.mean(1, keepdim=True), 0.6)


def alike(pixels: torch.Tensor) -> torch.Tensor:
    return pixels[:1].expand_as(pixels)


@pytest.fixture(scope="module")
def degraded(ranked: tuple[Results, Results], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Results of the untrained student with all its images degraded in one way."""
    from lcmdistill.teachers.loading import load_teacher

    teacher, equal, generate, found = (
        load_teacher("tiny"),
        ranked[0].folder.parent,
        sweep.student_latents,
        {"equal": ranked[0]},
    )
    for degrade in (blurred, washed_out, alike):
        run = tmp_path_factory.mktemp("degraded") / degrade.__name__
        shutil.copytree(equal, run)
        for path in (*(run / "evaluation" / "cells").glob("student-*"), run / "evaluation" / "latents"):
            shutil.rmtree(path)

        def degraded_latents(*args: Any, degrade: Any = degrade, **options: Any) -> torch.Tensor:
            return teacher.encode_images(degrade(teacher.decode(generate(*args, **options))) * 2 - 1)[0]

        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("LCMDISTILL_CACHE", str(equal.parent / "cache"))
            patched.setattr(sweep, "student_latents", degraded_latents)
            patched.setattr("lcmdistill.evaluation.select.MIN_KID_IMAGES", 8)
            shorten_references(patched)
            evaluate([run], EvaluationOptions(steps=(4,), guidance_scales=(1.0,), num_images=8, device="cpu"))
        found[degrade.__name__] = results_of(run)
    return found


@pytest.mark.parametrize(
    ("name", "measure"), [("blurred", "sharpness"), ("washed_out", "saturation"), ("alike", "diversity")]
)
def test_each_fault_is_found_by_its_own_metric(degraded: dict[str, Results], name: str, measure: str):
    """The metric of a fault ranks the degraded images below the untrained student and below the other two faults."""
    numbers = {each: results.number(measure, "student", 4) for each, results in degraded.items()}
    worst, others = numbers.pop(name), [value for value in numbers.values() if value is not None]
    assert worst is not None
    assert len(others) == 3
    assert worst < 0.6 * min(others), numbers
    words = {"blurred": "blurred", "washed_out": "pale", "alike": "too similar to each other"}
    reasons = " ".join(verdict(degraded[name]).reasons)
    assert f"{words[name]} ({measure.capitalize()} {worst:g} of the teacher's)" in reasons
    assert verdict(degraded[name]).headline.startswith("Not usable yet: at 4 steps, images are ")


@pytest.mark.parametrize(
    ("name", "measure"),
    [("blurred", "rmse"), ("washed_out", "rmse"), ("alike", "rmse"), ("blurred", "ssim"), ("alike", "ssim")],
)
def test_every_fault_is_further_from_the_teacher(degraded: dict[str, Results], name: str, measure: str):
    equal, worse = (degraded[each].number(measure, "student", 4) for each in ("equal", name))
    assert equal is not None
    assert worse is not None
    assert worse > 1.05 * equal if measure == "rmse" else worse < 0.95 * equal


def test_gray_images_of_a_gray_teacher_are_not_called_washed_out():
    gray = torch.full((2, 3, 8, 8), 0.5)
    tint = gray + torch.tensor([0.01, 0.0, 0.0]).view(1, 3, 1, 1)
    red = gray + torch.tensor([0.4, 0.0, 0.0]).view(1, 3, 1, 1)

    saturation = BASIC_METRICS["saturation"]

    def measured(own: torch.Tensor, reference: torch.Tensor) -> float:
        return saturation.reduce(saturation.per_image(ImagePair(own, own, reference, reference, ("a", "b"))))

    assert measured(gray, tint) == measured(tint, gray) == 1.0
    assert measured(gray, red) < 0.1
    assert measured(red, gray) > 10
    assert measured(red, red) == 1.0


def test_an_untrained_student_is_more_consistent_than_a_broken_one(ranked: tuple[Results, Results]):
    equal, broken = (sum(y for _, y, _ in results.consistency) for results in ranked)
    assert equal < 0.5 * broken
    for x, of_student, of_teacher in ranked[0].consistency:  # at guidance 1 it is the teacher, but for c_skip near 0
        assert of_student == pytest.approx(of_teacher, rel=0.02, abs=2e-4) or x < 0.05


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
        return program.chosen_prompts([other], options, teacher)

    own: dict[str, Any] = {"data.sources": ("teacher",), "data.prompts": str(tmp_path / "trained.txt")}
    assert chosen(2) == ("a", "c")
    assert chosen(6) == ("a", "b", "c", "d", "a", "b")
    assert chosen(2, **own) == ("a", "d")
    both = [EvaluatedRun(each.run, with_values(each.config, more), each.model) for more in ({}, own)]
    options = EvaluationOptions(prompts=str(tmp_path / "p.txt"), num_images=2)
    assert program.chosen_prompts(both, options, teacher) == ("a", "d")  # held out of the one and the other
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
        ({"clip": "no/such-clip"}, "--clip no/such-clip is neither a folder nor in the local hub cache"),
        ({"scorer": "ImageReward.pt"}, "--scorer ImageReward.pt is a bare checkpoint"),
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
