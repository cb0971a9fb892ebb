"""The verdict on a sweep, from numbers whose meaning is known."""

from pathlib import Path
from typing import Any

import pytest

from lcmdistill.evaluation.results import Results
from lcmdistill.evaluation.verdict import seconds, verdict


def sweep_of(
    student: dict[int, dict[str, float]],
    teacher: dict[int, dict[str, float]],
    own: float = 1.0,
    its: float = 1.0,
    images: int = 64,
) -> Results:
    """Results at guidance 4 with these numbers."""
    points: dict[str, Any] = {}
    for sampler, rows in (("student", student), ("teacher", teacher)):
        for n, numbers in rows.items():
            points[f"{sampler}-{n:02d}-g4"] = {
                "numbers": numbers,
                "seconds_per_image": (own if sampler == "student" else its) * n,
            }
    better = {"kid": "lower", "kid_teacher": "lower", "rmse": "lower", "ssim": "higher"}
    metrics = {
        name: {"better": better.get(name, "one"), "label": name.upper()} for name in next(iter(student.values()))
    }
    info = {"steps": list(student), "guidance_scales": [4.0], "metrics": metrics, "images": images}
    return Results(Path(), info, points)


TEACHER = {1: 1.138, 2: 0.55, 4: 0.196, 8: 0.119, 50: 0.095}


def kids(values: dict[int, float]) -> dict[int, dict[str, float]]:
    return {n: {"kid": value} for n, value in values.items()}


def test_four_steps_of_the_demo_are_enough_and_one_is_not():
    """Four steps are as close to real images as the teacher's 50, although eight are closer."""
    kid, ssim = {1: 0.355, 2: 0.128, 4: 0.11, 8: 0.069}, {1: 0.558, 2: 0.733, 4: 0.764, 8: 0.749}
    its = {1: (1.12, 0.088), 2: (0.578, 0.373), 4: (0.248, 0.763), 8: (0.149, 0.916), 50: (0.125, 1.0)}
    student = {n: {"kid": kid[n], "ssim": ssim[n]} for n in kid}
    teacher = {n: {"kid": k, "ssim": s} for n, (k, s) in its.items()}
    judged = verdict(sweep_of(student, teacher, own=0.05, its=0.1))
    assert judged.headline == "4 steps are enough; 2 come close, 1 is clearly worse."
    assert (judged.enough, judged.usable) == (4, True)
    assert judged.reasons[0].startswith(
        "At 4 steps the student's images are as close to real images as the teacher's at 50 steps (KID 0.11 and 0.125;"
    )
    assert (
        judged.reasons[1] == "One image takes 0.2 s at 4 steps, and 5 s with the teacher's 50 steps, 25 times as long."
    )


def test_headlines_of_other_sweeps():
    rising = verdict(sweep_of(kids({1: 0.315, 2: 0.094}), kids(TEACHER)))
    assert rising.headline == "2 steps is the best of those tested, and more may be better; 1 is clearly worse."
    single = verdict(sweep_of(kids({1: 0.315}), kids(TEACHER)))
    assert single.headline == "Only 1 step was evaluated; more may be better."
    assert single.enough is None
    one = verdict(sweep_of(kids({1: 0.064, 2: 0.064, 4: 0.065}), kids(TEACHER)))
    assert one.headline == "1 step is enough."
    broken = verdict(sweep_of(kids({1: 1.5, 2: 1.4, 4: 1.3}), kids(TEACHER)))
    assert not broken.usable
    assert broken.headline == "This student is not usable yet: the teacher is better at the same number of steps."


def test_without_features_the_similarity_to_the_teacher_decides():
    student = {n: {"ssim": s, "sharpness": d} for n, s, d in ((1, 0.59, 0.6), (2, 0.75, 0.9), (4, 0.756, 1.0))}
    teacher = {n: {"ssim": s, "sharpness": 1.0} for n, s in ((1, 0.09), (2, 0.36), (4, 0.73), (50, 1.0))}
    judged = verdict(sweep_of(student, teacher))
    assert judged.headline == "2 steps are enough; 1 is clearly worse."
    assert any(
        reason.startswith("At 1 step, images are blurry (sharpness 0.6 of the teacher's) and further")
        for reason in judged.reasons
    )


def test_a_teacher_closer_to_itself_at_8_steps_does_not_make_a_student_unusable():
    """Fresh noise takes a student off its teacher's trajectory; with many steps the teacher stays on it."""
    both = {1: (0.478, 0.485), 2: (0.309, 0.651), 4: (0.209, 0.698), 8: (0.095, 0.702)}
    its = {1: (1.09, 0.115), 2: (0.84, 0.331), 4: (0.349, 0.733), 8: (0.242, 0.915), 50: (0.209, 1.0)}
    student, teacher = ({n: {"kid": k, "ssim": s} for n, (k, s) in rows.items()} for rows in (both, its))
    judged = verdict(sweep_of(student, teacher))
    assert judged.usable
    assert judged.headline == "4 steps are enough; 1 and 2 are clearly worse."
    # A decrease with more steps does not count against them.
    student = {
        n: {"kid": k, "ssim": s} for n, k, s in ((1, 0.3, 0.6), (2, 0.15, 0.75), (4, 0.12, 0.7), (8, 0.119, 0.6))
    }
    assert verdict(sweep_of(student, teacher)).headline == "2 steps are enough; 1 is clearly worse."
    broken = {n: {"ssim": 0.12} for n in both}
    assert not verdict(sweep_of(broken, {n: {"ssim": s} for n, (_, s) in its.items()})).usable


FINE = {"sharpness": 1.0, "saturation": 1.0, "diversity": 1.0, "ssim": 0.7, "kid_teacher": 0.01}


def judged_alone(**numbers: float) -> Any:
    """The verdict on a student with these numbers at every number of steps; its teacher is noise at few steps."""
    teacher = {n: {**FINE, "ssim": 0.1 * n, "kid_teacher": 1.0 / n} for n in (1, 2, 4)}
    return verdict(sweep_of({n: {**FINE, **numbers} for n in (1, 2, 4)}, {**teacher, 50: {**FINE, "ssim": 1.0}}))


def test_a_student_of_pale_smears_is_not_usable_however_good_it_is_relative_to_its_own_best():
    judged = judged_alone(sharpness=0.095, saturation=0.347, ssim=0.5)
    assert judged.headline == "Not usable yet: at 4 steps, images are blurred and pale."
    assert (judged.enough, judged.usable) == (None, False)
    assert set(judged.grades.values()) == {"unusable"}
    assert any("SHARPNESS 0.095 of the teacher's" in reason for reason in judged.reasons)
    assert "Train longer" in judged.reasons[0]


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ({"sharpness": 0.3}, "blurred"),
        ({"sharpness": 4.0}, "noisy or over-sharpened"),
        ({"saturation": 0.4}, "pale"),
        ({"saturation": 2.0}, "oversaturated"),
        ({"diversity": 0.2}, "too similar to each other"),
        ({"ssim": 0.05}, "unlike the teacher's"),
        ({"kid_teacher": 0.6}, "of other content than the teacher's"),
    ],
)
def test_each_limit_makes_a_student_unusable(numbers: dict[str, float], word: str):
    judged = judged_alone(**numbers)
    assert judged.headline == f"Not usable yet: at 4 steps, images are {word}."


def test_unusable_steps_do_not_count_and_are_named():
    student = {1: {**FINE, "sharpness": 0.2}, 2: FINE, 4: FINE}
    teacher = {n: {**FINE, "ssim": 0.1 * n} for n in student}
    judged = verdict(sweep_of(student, {**teacher, 50: FINE}))
    assert judged.headline == "2 steps are enough; 1 is not usable."
    assert judged.grades == {1: "unusable", 2: "enough", 4: "enough"}


def test_kid_decides_nothing_with_few_images():
    student, teacher = kids({1: 0.9, 2: 0.9, 4: 0.1}), kids(TEACHER)
    assert verdict(sweep_of(student, teacher)).enough == 4
    few = verdict(sweep_of(student, teacher, images=6))
    assert few.enough == 1
    assert not any("real images" in reason for reason in few.reasons)
    assert any("With 6 images, small differences may be chance" in reason for reason in few.reasons)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0409, "41 ms"), (0.234, "0.23 s"), (12.3, "12 s"), (125.0, "2 min 5 s")]
)
def test_times_are_readable(value: float, text: str):
    assert seconds(value) == text


def test_the_headline_names_what_is_odd_about_enough_steps():
    """Blurry images can be the student's best, and better than the teacher's at as few steps."""
    teacher = {n: {"ssim": s, "sharpness": 1.0} for n, s in ((1, 0.09), (2, 0.36), (4, 0.73), (50, 1.0))}
    student = {n: {"ssim": s, "sharpness": d} for n, s, d in ((1, 0.59, 0.6), (2, 0.75, 0.75), (4, 0.756, 1.3))}
    judged = verdict(sweep_of(student, teacher))
    assert judged.headline == "2 steps are enough, but images are blurry; 1 is clearly worse."
    assert any(
        reason == "At 2 steps, images are blurry (sharpness 0.75 of the teacher's)." for reason in judged.reasons
    )
