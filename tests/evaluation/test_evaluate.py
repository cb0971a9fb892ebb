"""`lcmdistill evaluate`: what a sweep draws, writes, skips and rejects, and how it ranks students whose worth is known."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.config.resolve import with_values
from lcmdistill.evaluation import evaluate as program
from lcmdistill.evaluation import sweep
from lcmdistill.evaluation.evaluate import EvaluationOptions, evaluate
from lcmdistill.evaluation.metrics.measures import FREE, ImagePair
from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.utils.errors import UsageError
from tests.support.finished_runs import finished_run
from tests.support.runs import distill, resolve

WISH: dict[str, Any] = {"steps": (1, 2), "guidance_scales": (4.0, 2.0), "num_images": 5, "device": "cpu"}

Evaluated = Callable[..., Results]


@pytest.fixture
def evaluated(tmp_path: Path, small_run: Path, small_features: Path) -> Evaluated:
    """Evaluate a copy of the small run, tmp_path / name, with what is said otherwise."""

    def evaluated(name: str = "run", **changes: Any) -> Results:
        run = tmp_path / name
        if not run.is_dir():
            shutil.copytree(small_run, run)
        evaluate([run], EvaluationOptions(**{**WISH, "features": small_features, **changes}))
        found = read_results(run)
        assert found is not None
        return found

    return evaluated


def written(results: Results) -> dict[str, Any]:
    """All numbers of a sweep, without what depends on the clock."""
    return {name: cell["numbers"] for name, cell in results.cells.items()}


def test_a_sweep_has_a_cell_for_each_way_to_draw(evaluated: Evaluated):
    found = evaluated()
    expected = {f"student-{n:02d}-g{g}" for n in (1, 2) for g in (2, 4)} | {"teacher-50-g4", "teacher-50-g2"}
    expected |= {f"{sampler}-{n:02d}-g4" for sampler in ("teacher", "trailing") for n in (1, 2)}
    assert set(found.cells) == expected
    assert found.guidance_scale == 4.0
    full = found.cells["teacher-50-g4"]["numbers"]
    assert (full["rmse"], full["ssim"]) == (0.0, 1.0)
    assert full["sharpness"] == full["saturation"] == full["diversity"] == 1.0
    for cell in found.cells.values():
        assert cell["images"] == 5
        assert set(cell["numbers"]) == {"rmse", "ssim", "sharpness", "saturation", "diversity", "kid"}
        assert cell["seconds_an_image"] > 0
        assert cell["how"].startswith("batches of 5 on cpu, ")
    assert len(found.pictures("student", 1, 4.0)) == 5


def test_every_number_says_what_it_is(evaluated: Evaluated):
    kid = evaluated().about["measures"]["kid"]
    assert kid["label"] == "KID (small)"
    assert (kid["features"], kid["published"]) == ("small, 8 features", "no published figure")
    assert kid["against"].startswith("10 real images of ")
    for name, about in evaluated().about["measures"].items():
        assert about["better"] in ("lower", "higher", "one")
        assert all(about[key] for key in ("label", "about", "features", "against", "published")), name


def test_a_second_sweep_draws_nothing_and_says_the_same(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch):
    first = evaluated()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "sweep.json"}
    for name in ("student_latents", "teacher_latents"):
        monkeypatch.setattr(sweep, name, lambda *args, **options: pytest.fail("drawn again"))
    again = evaluated()
    assert written(again) == written(first)
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "sweep.json"} == before


def test_numbers_repeat_and_do_not_depend_on_the_batch_size(evaluated: Evaluated, small_run: Path, tmp_path: Path):
    """Repeated to the last digit that is written, and in other batches to one of it: there the latents agree to rounding (a
    product of other shapes adds up in another order), and a number may lie where two digits meet."""
    found, latents = [], []
    for name, batch_size in (("three", 3), ("again", 3), ("one", 1), ("two", 2)):
        if name in ("three", "one"):  # the teacher too draws in other batches
            with_own_cache(small_run, tmp_path / name, tmp_path / f"cache-{name}")
        results = evaluated(name, batch_size=batch_size, guidance_scales=(4.0,), num_images=3)
        found.append(written(results))
        paths = sorted((results.folder / "latents").glob("*.safetensors"))
        latents.append(torch.stack([load_file(path)["latents"] for path in paths]))
    assert found[0] == found[1]
    for other in found[2:]:
        for name, numbers in found[0].items():
            assert other[name] == pytest.approx(numbers, rel=0.011, abs=0.0011), name
    assert torch.equal(latents[0], latents[1])
    scale = float(latents[0].abs().max())
    assert max(float((other - latents[0]).abs().max()) for other in latents[2:]) < 1e-4 * scale


def test_a_sweep_that_was_cut_off_goes_on(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole = written(evaluated("whole"))
    draw, drawn = sweep.student_latents, []

    def cut_off(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(options["steps"])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "student_latents", cut_off)
        with pytest.raises(KeyboardInterrupt):
            evaluated("cut")
    cells = tmp_path / "cut" / "evaluation" / "cells"
    assert sorted(path.name for path in cells.iterdir()) == ["student-01-g4", "teacher-50-g4"]
    first = (cells / "student-01-g4" / "numbers.json").stat().st_mtime_ns
    assert written(evaluated("cut")) == whole
    assert (cells / "student-01-g4" / "numbers.json").stat().st_mtime_ns == first


def with_own_cache(small_run: Path, run: Path, cache: Path) -> None:
    """A copy of the small run that shares nothing that its teacher drew."""
    shutil.copytree(small_run, run)
    config = (run / "config.toml").read_text()
    lines = [line for line in config.splitlines() if not line.startswith("cache_dir")]
    (run / "config.toml").write_text("\n".join(lines).replace("[data]", f'[data]\ncache_dir = "{cache}"'))


def test_what_is_broken_is_made_again(evaluated: Evaluated, small_run: Path, tmp_path: Path):
    """Half a file, as a full disk or a power cut may leave one: of latents, of numbers, of the curve."""
    with_own_cache(small_run, tmp_path / "run", tmp_path / "cache")
    first = evaluated(guidance_scales=(4.0,), num_images=2)
    numbers, points = written(first), first.consistency
    kept = [*(first.folder / "latents").iterdir(), *(tmp_path / "cache" / "evaluation").iterdir()]
    assert len(kept) > 7
    kept += [first.folder / "cells" / "student-02-g4" / "numbers.json", first.folder / "consistency.json"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    (first.folder / "cells" / "teacher-50-g4" / "numbers.json").unlink()
    again = evaluated(guidance_scales=(4.0,), num_images=2)
    assert (written(again), again.consistency) == (numbers, points)


def test_more_steps_than_a_scheduler_has_are_refused_before_anything_is_drawn(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep, "teacher_latents", lambda *args, **options: pytest.fail("drawn"))
    with pytest.raises(UsageError, match="--steps is 60; this model's scheduler has 50"):
        evaluated(steps=(2, 60))


def test_what_a_teacher_drew_serves_every_run_of_it(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch):
    evaluated("one")
    monkeypatch.setattr(sweep, "teacher_latents", lambda *args, **options: pytest.fail("drawn again"))
    evaluated("two")


def test_other_weights_are_drawn_anew(evaluated: Evaluated, tmp_path: Path):
    first = written(evaluated())
    noise_weights(tmp_path / "run", 0.3)
    second = written(evaluated())
    assert second["teacher-50-g4"] == first["teacher-50-g4"]
    assert second["student-02-g4"] != first["student-02-g4"]
    assert len(list((tmp_path / "run" / "evaluation" / "latents").iterdir())) == 4


def noise_weights(run: Path, size: float) -> None:
    """Add noise to every weight of a run's student, as large as `size` of the weight's own spread."""
    path = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if value.numel() > 1:
            tensors[name] = value + size * value.std() * torch.randn(value.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """What is measured of the tiny teacher's untrained student, which is the teacher, and of one with noise in its weights.

    At guidance scale 1, where nothing is left to be learnt but to jump.
    """
    place, found = tmp_path_factory.mktemp("ranked"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LCMDISTILL_CACHE", str(place / "cache"))
        settings: dict[str, Any] = {
            "teacher.model": "tiny",
            "run.output": str(place / "equal"),
            "run.validate_every": 0,
        }
        settings |= {
            "optim.learning_rate": 0.0,
            "optim.max_train_steps": 1,
            "optim.batch_size": 1,
            "data.max_samples": 16,
        }
        distill(resolve({}, {**settings, "run.device": "cpu"}))
        shutil.copytree(place / "equal", place / "broken")
        noise_weights(place / "broken", 0.4)
        for name in ("equal", "broken"):
            evaluate([place / name], EvaluationOptions(steps=(4,), guidance_scales=(1.0,), num_images=8, device="cpu"))
            results = read_results(place / name)
            assert results is not None
            found.append(results)
    return found[0], found[1]


@pytest.mark.parametrize("measure", ["rmse", "ssim", "sharpness", "saturation", "diversity", "kid"])
def test_an_untrained_student_is_ranked_above_a_broken_one(ranked: tuple[Results, Results], measure: str):
    equal, broken = (results.number(measure, "student", 4) for results in ranked)
    assert equal is not None
    assert broken is not None
    better = ranked[0].about["measures"][measure]["better"]
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
def spoilt(ranked: tuple[Results, Results], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """What is measured of the untrained student if all that it draws is spoilt in one way."""
    from lcmdistill.teachers.loading import load_teacher

    teacher, equal, draw, found = (
        load_teacher("tiny"),
        ranked[0].folder.parent,
        sweep.student_latents,
        {"equal": ranked[0]},
    )
    for spoil in (blurred, washed_out, alike):
        run = tmp_path_factory.mktemp("spoilt") / spoil.__name__
        shutil.copytree(equal, run)
        for path in (*(run / "evaluation" / "cells").glob("student-*"), run / "evaluation" / "latents"):
            shutil.rmtree(path)

        def draws(*args: Any, spoil: Callable[[torch.Tensor], torch.Tensor] = spoil, **options: Any) -> torch.Tensor:
            return teacher.encode_images(spoil(teacher.decode(draw(*args, **options))) * 2 - 1)[0]

        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("LCMDISTILL_CACHE", str(equal.parent / "cache"))
            patched.setattr(sweep, "student_latents", draws)
            evaluate([run], EvaluationOptions(steps=(4,), guidance_scales=(1.0,), num_images=8, device="cpu"))
        results = read_results(run)
        assert results is not None
        found[spoil.__name__] = results
    return found


@pytest.mark.parametrize(
    ("name", "measure"), [("blurred", "sharpness"), ("washed_out", "saturation"), ("alike", "diversity")]
)
def test_each_fault_is_found_by_its_own_measure(spoilt: dict[str, Results], name: str, measure: str):
    """What is spoilt in one way is ranked below the untrained student by that way's measure, and below the other two."""
    numbers = {each: results.number(measure, "student", 4) for each, results in spoilt.items()}
    spoiled, others = numbers.pop(name), [value for value in numbers.values() if value is not None]
    assert spoiled is not None
    assert len(others) == 3
    assert spoiled < 0.6 * min(others), numbers
    words = {"blurred": "blurred", "washed_out": "washed out", "alike": "too much alike"}
    said = " ".join(verdict(spoilt[name]).reasons)
    assert f"{words[name]} ({measure} {spoiled:g} of the teacher's)" in said


@pytest.mark.parametrize(
    ("name", "measure"),
    [("blurred", "rmse"), ("washed_out", "rmse"), ("alike", "rmse"), ("blurred", "ssim"), ("alike", "ssim")],
)
def test_every_fault_is_further_from_the_teacher(spoilt: dict[str, Results], name: str, measure: str):
    equal, worse = (spoilt[each].number(measure, "student", 4) for each in ("equal", name))
    assert equal is not None
    assert worse is not None
    assert worse > 1.05 * equal if measure == "rmse" else worse < 0.95 * equal


def test_grey_pictures_of_a_grey_teacher_are_not_called_washed_out():
    grey = torch.full((2, 3, 8, 8), 0.5)
    tint = grey + torch.tensor([0.01, 0.0, 0.0]).view(1, 3, 1, 1)
    red = grey + torch.tensor([0.4, 0.0, 0.0]).view(1, 3, 1, 1)

    def measured(own: torch.Tensor, reference: torch.Tensor) -> float:
        return FREE["saturation"].value(FREE["saturation"].kept(ImagePair(own, own, reference, reference, ("a", "b"))))

    assert measured(grey, tint) == measured(tint, grey) == 1.0
    assert measured(grey, red) < 0.1
    assert measured(red, grey) > 10
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

    each, teacher = program.evaluated_run(small_run), load_teacher(str(small_teacher))
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "trained.txt").write_text("b\nc\n")

    def chosen(count: int, **config: Any) -> tuple[str, ...]:
        asked = EvaluationOptions(prompts=str(tmp_path / "p.txt"), num_images=count)
        other = program.EvaluatedRun(each.run, with_values(each.config, config), each.found)
        return program.chosen_prompts([other], asked, teacher)

    own: dict[str, Any] = {"data.sources": ("teacher",), "data.prompts": str(tmp_path / "trained.txt")}
    assert chosen(2) == ("a", "c")
    assert chosen(6) == ("a", "b", "c", "d", "a", "b")
    assert chosen(2, **own) == ("a", "d")
    both = [program.EvaluatedRun(each.run, with_values(each.config, more), each.found) for more in ({}, own)]
    asked = EvaluationOptions(prompts=str(tmp_path / "p.txt"), num_images=2)
    assert program.chosen_prompts(both, asked, teacher) == ("a", "d")  # held out of the one and the other
    (tmp_path / "trained.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(UsageError, match="was trained on every one of them"):
        chosen(2, **own)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"inception": Path("x.pt")}, "FID needs at least 10000 images and 5 are to be drawn"),
        ({"features": Path("x.pt")}, "--features x.pt is not there"),
        ({"clip": "no/such-clip"}, "--clip no/such-clip is neither a folder nor in the local hub cache"),
        ({"scorer": "ImageReward.pt"}, "--scorer ImageReward.pt is a bare checkpoint"),
        ({"lpips": Path("x.pth")}, "--lpips x.pth is not there; give torchvision's file"),
        ({"real": "/nowhere"}, "--real /nowhere does not exist; pass a folder of images, .tar shards, or tiny"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(evaluated: Evaluated, wish: Any, message: str):
    with pytest.raises(Exception, match=message) as caught:
        evaluated(**wish)
    assert "\n" not in str(caught.value)


def test_runs_are_held_against_the_same_real_images(small_run: Path, tmp_path: Path, image_folder: Path):
    each = program.evaluated_run(small_run)

    def source(*data: str, real: str | None = None) -> str | None:
        some = [
            program.EvaluatedRun(each.run, with_values(each.config, {"data.sources": (spec,)}), each.found)
            for spec in data
        ]
        return program.real_source(some, EvaluationOptions(real=real))

    assert source("teacher", str(image_folder), "tiny") == str(image_folder)
    assert source("teacher", "tiny", real="elsewhere") == "elsewhere"
    # Nothing is fetched, and no command run, for what nobody asked for.
    assert source("teacher", "https://example.invalid/a.tar", "pipe:cat a.tar", str(tmp_path / "gone")) is None


def test_guidance_that_is_in_the_weights_cannot_be_asked_for(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = finished_run(small_teacher, "lora", tmp_path / "lora")
    monkeypatch.setattr(program, "_evaluate_one", lambda *args: None)
    own = program.evaluated_run(run).guidance_scale
    for scales, told in (((), False), ((own,), False), ((9.5,), True)):
        evaluate([run], EvaluationOptions(guidance_scales=scales, device="cpu"))
        assert (f"its guidance, {own:g}, is in its weights" in capsys.readouterr().out) == told


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path, small_run: Path):
    with pytest.raises(UsageError, match="is not a run folder"):
        evaluate([tmp_path], EvaluationOptions())
    (tmp_path / "config.toml").write_bytes((small_run / "config.toml").read_bytes())
    with pytest.raises(UsageError, match="has not finished"):
        evaluate([tmp_path], EvaluationOptions())
