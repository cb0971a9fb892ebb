"""How an evaluation ranks students and images of known quality."""

import shutil
from typing import Any

import pytest
import torch

from lcmdistill.evaluation import sweep
from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.metrics.base import ImagePair
from lcmdistill.evaluation.metrics.basic import BASIC_METRICS
from lcmdistill.evaluation.options import EvaluationOptions
from lcmdistill.evaluation.results import Results
from lcmdistill.evaluation.verdict import verdict
from tests.support.evaluated import noise_weights, results_of, shorten_references
from tests.support.runs import distill, resolve

pytestmark = pytest.mark.slow


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
        patched.setattr("lcmdistill.evaluation.metrics.features.MIN_KID_IMAGES", 8)
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
        for path in (*(run / "evaluation" / "points").glob("student-*"), run / "evaluation" / "latents"):
            shutil.rmtree(path)

        def degraded_latents(*args: Any, degrade: Any = degrade, **options: Any) -> torch.Tensor:
            return teacher.encode_images(degrade(teacher.decode(generate(*args, **options))) * 2 - 1)[0]

        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("LCMDISTILL_CACHE", str(equal.parent / "cache"))
            patched.setattr(sweep, "student_latents", degraded_latents)
            patched.setattr("lcmdistill.evaluation.metrics.features.MIN_KID_IMAGES", 8)
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
