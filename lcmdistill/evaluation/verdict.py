"""The verdict on a sweep in plain words: how many steps are enough, and what fewer steps lack."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.metrics.features import MIN_KID_IMAGES
from lcmdistill.evaluation.results import Results

Grade = Literal["enough", "close", "worse", "unusable"]

DECISIVE_METRICS = ("kid_teacher", "fid", "kid", "lpips", "ssim")
"the metrics that decide, if they were computed"

SET_METRICS = ("kid_teacher", "fid", "kid")
"the metrics that compare sets of images, of which few images say nothing"


@dataclass(frozen=True)
class Limits:
    """The range of a metric in which images are usable at all, whatever the student's best is.

    Attributes:
        low: The smallest usable value.
        high: The largest usable value.
        below: What images below the range are.
        above: What images above the range are.
        unit: What follows the value in a sentence.
    """

    low: float
    high: float
    below: str
    above: str = ""
    unit: str = " of the teacher's"


LIMITS: Mapping[str, Limits] = {
    "sharpness": Limits(0.5, 2.0, "blurred", "noisy or over-sharpened"),
    "saturation": Limits(0.6, 1.5, "pale", "oversaturated"),
    "diversity": Limits(0.7, math.inf, "too similar to each other"),
    "ssim": Limits(0.2, math.inf, "unlike the teacher's", unit=""),
    "kid_teacher": Limits(-math.inf, 0.3, "", "of other content than the teacher's", unit=""),
}
"set from the numbers in examples/guides/evaluation.md"

ENOUGH, CLOSE = 0.025, 0.1
"largest gap of a grade: the distance from the student's best, relative to the way to the teacher's single step"

MIN_IMAGES = 16
"with fewer images, small differences may be chance"

NOTABLE = 0.2
"deviation of a ratio to the teacher from 1 that is worth a sentence"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a student.

    Attributes:
        grades: The grade of each number of steps.
        enough: The smallest sufficient number of steps; None if only one was evaluated, or none is usable.
        usable: Whether the student generates good images at all.
        headline: One sentence.
        reasons: A few more sentences.
    """

    grades: dict[int, Grade]
    enough: int | None
    usable: bool
    headline: str
    reasons: tuple[str, ...]


def verdict(results: Results) -> Verdict:
    """Judge a sweep at its first guidance scale.

    A number of steps is unusable if a metric is outside of its LIMITS. It is enough if its gap is at most ENOUGH by every
    decisive metric. The gap is the distance from the student's best, or from the teacher at full steps, relative to the way
    to the teacher's single step, which is little more than noise. More steps than a metric's best are never worse, even if
    the similarity to one trajectory decreases again.
    """
    decisive = [name for name in DECISIVE_METRICS if _carries(results, name)]
    deciding = [name for name in decisive if _gap(results, name, results.steps[0]) is not None]
    gaps = {
        n: max((min(_gap(results, name, m) or 0.0 for m in results.steps if m <= n) for name in deciding), default=0.0)
        for n in results.steps
    }
    failures = {n: outside_limits(results, n) for n in results.steps}
    grades: dict[int, Grade] = {
        n: "unusable" if failures[n] else "enough" if gap <= ENOUGH else "close" if gap <= CLOSE else "worse"
        for n, gap in gaps.items()
    }
    passed = [n for n in results.steps if not failures[n]]
    if not passed:
        return _failed(results, grades, failures)
    # The best by its gap may be among the unusable ones.
    chosen = next((n for n in passed if grades[n] == "enough"), min(passed, key=lambda n: (gaps[n], n)))
    grades[chosen] = "enough"
    # A single number of steps cannot be compared with others.
    enough = chosen if len(results.steps) > 1 else None
    # With more steps, a teacher stays on its full steps' trajectory and a student leaves it. One number of steps at which
    # the student keeps up shows that it works. A single step shows nothing: there the teacher's image is noise.
    compared = [n for n in results.steps if n > 1] or results.steps
    usable = all(any(_is_sound(results, name, n) for n in compared) for name in deciding)
    reasons = [*_compared_with_teacher(results, chosen), *_time(results, chosen)]
    reasons += [text for n in results.steps if n <= chosen for text in _shortcomings(results, n, grades[n], chosen)]
    if (images := results.info.get("images", MIN_IMAGES)) < MIN_IMAGES:
        reasons.append(f"With {images} images, small differences may be chance; use --num-images {MIN_IMAGES} or more.")
    flaws = [flaw.word for flaw in _flaws(results, enough)] if enough is not None else []
    return Verdict(grades, enough, usable, _headline(grades, enough, usable, flaws), tuple(reasons))


def _carries(results: Results, name: str) -> bool:
    """Return whether there are enough images for a metric to decide anything."""
    return name not in SET_METRICS or results.info.get("images", MIN_KID_IMAGES) >= MIN_KID_IMAGES


def outside_limits(results: Results, steps: int) -> list[str]:
    """Return how images of a number of steps fail, one text per metric outside of its LIMITS."""
    texts = []
    for name, limits in LIMITS.items():
        value = results.number(name, "student", steps)
        if value is not None and _carries(results, name) and not limits.low <= value <= limits.high:
            word, label = (limits.below if value < limits.low else limits.above), results.metrics[name]["label"]
            texts.append(f"{word} ({label} {value:g}{limits.unit})")
    return texts


def _failed(results: Results, grades: dict[int, Grade], failures: Mapping[int, Sequence[str]]) -> Verdict:
    """Return the verdict on a student of which no number of steps is usable, by the one that fails least."""
    best = min(results.steps, key=lambda n: (len(failures[n]), -n))
    words = [text.partition(" (")[0] for text in failures[best]]
    headline = f"Not usable yet: at {_steps(best)}, images are {_joined(words)}."
    remedy = (
        "Train longer; if the validation images stopped improving, use a lower learning rate, or the weights of the best "
        "validation: lcmdistill export --weights best."
    )
    reasons = [f"At {_steps(n)}, images are {_joined(failures[n])}." for n in results.steps]
    return Verdict(grades, None, False, headline, (remedy, *_compared_with_teacher(results, best), *reasons))


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _gap(results: Results, name: str, steps: int) -> float | None:
    """Return how far a number is from the student's best (0), towards the teacher's single step (1).

    A student need not be closer to real images than its teacher at full steps: such a number has no gap.
    """
    numbers = [results.number(name, "student", n) for n in results.steps]
    anchor, value = results.number(name, "teacher", min(results.steps)), results.number(name, "student", steps)
    known = [x for x in numbers if x is not None]
    if anchor is None or value is None or not known:
        return None
    if results.metrics[name]["better"] == "higher":
        best, missing = max(known), max(known) - value
    else:
        full = results.full(name) if name in ("fid", "kid") else None
        best = max(min(known), full or 0.0)
        missing = value - best
    return max(0.0, missing) / abs(anchor - best) if anchor != best else 0.0


def _is_sound(results: Results, name: str, steps: int) -> bool:
    """Return whether the student is as good as its teacher at full steps, or at least at the same number of steps."""
    value = results.number(name, "student", steps)
    teacher = [results.full(name)] if name in ("fid", "kid") else []
    teacher += [results.number(name, "teacher", steps)]
    known = [number for number in teacher if number is not None]
    if value is None or not known:
        return True
    if results.metrics[name]["better"] == "higher":
        return value >= 0.9 * min(known)
    return value <= 1.1 * max(known)


def _headline(grades: dict[int, Grade], enough: int | None, usable: bool, flaws: Sequence[str]) -> str:
    if not usable:
        return "This student is not usable yet: the teacher is better at the same number of steps."
    if enough is None:
        return f"Only {_steps(max(grades))} {_is(max(grades))} evaluated; more may be better."
    close = [n for n, grade in grades.items() if grade == "close"]
    short = [n for n, grade in grades.items() if grade == "worse"]
    failed = [n for n, grade in grades.items() if grade == "unusable"]
    text = f"{_steps(enough)} {'is' if enough == 1 else 'are'} enough"
    if enough == max(grades):  # the numbers had not leveled off
        text = f"{_steps(enough)} is the best of those tested, and more may be better"
    if flaws:
        text += f", but images are {_joined(flaws)}"
    more = []
    if close:
        more.append(f"{_several(close)} {'comes' if close == [1] else 'come'} close")
    if short:
        more.append(f"{_several(short)} {'is' if short == [1] else 'are'} clearly worse")
    if failed:
        more.append(f"{_several(failed)} {'is' if failed == [1] else 'are'} not usable")
    return f"{text}; {', '.join(more)}." if more else f"{text}."


def _is(count: int) -> str:
    return "was" if count == 1 else "were"


def _steps(n: int) -> str:
    return f"{n} step{'s' * (n > 1)}"


def _several(steps: list[int]) -> str:
    return _joined([str(n) for n in steps])


def _compared_with_teacher(results: Results, steps: int) -> list[str]:
    to_teacher = _kid_to_teacher(results, steps)
    for name in ("fid", "kid"):
        student, full = results.number(name, "student", steps), results.full(name)
        if student is None or full is None or not _carries(results, name):
            continue
        few, error = results.number(name, "teacher", steps), results.error(name, "student", steps) or 0.0
        label, with_error = results.metrics[name]["label"], f"{student:g}{f' ± {error:g}' if error else ''}"
        relation = "as close to real images as"
        if student > max(1.1 * full, full + 2 * error):
            relation = "further from real images than"
        elif student > 1.1 * full:
            relation = "not measurably further from real images than"
        more = "" if few is None else f" The teacher at {_steps(steps)}: {few:g}."
        return [
            *to_teacher,
            f"At {_steps(steps)} the student's images are {relation} the teacher's at {TEACHER_STEPS} steps "
            f"({label} {with_error} and {full:g}; lower is better).{more}",
        ]
    if to_teacher:
        return to_teacher
    student, few = results.number("ssim", "student", steps), results.number("ssim", "teacher", steps)
    if student is None or few is None:
        return []
    relation = "closer to" if student > few else "further from"
    return [
        f"At {_steps(steps)} the student is {relation} the teacher's {TEACHER_STEPS}-step images than the teacher itself at "
        f"{_steps(steps)} (SSIM {student:g} and {few:g}; 1 is identical)."
    ]


def _kid_to_teacher(results: Results, steps: int) -> list[str]:
    """Return how far the student's images are from the teacher's own, as sets, with the standard error; [] if not known."""
    student, few = (results.number("kid_teacher", sampler, steps) for sampler in ("student", "teacher"))
    if student is None or few is None or not _carries(results, "kid_teacher"):
        return []
    error = results.error("kid_teacher", "student", steps) or 0.0
    apart = abs(student - few) > 2 * error
    relation = "closer to" if student < few else "further from"
    relation = relation if apart else "measurably neither closer to nor further from"
    return [
        f"At {_steps(steps)} the student is {relation} the teacher's {TEACHER_STEPS}-step images than the teacher itself at "
        f"{_steps(steps)} ({results.metrics['kid_teacher']['label']} {student:g} ± {error:g} and {few:g}; 0 is equal)."
    ]


def _time(results: Results, steps: int) -> list[str]:
    student, full = results.seconds("student", steps), results.seconds("teacher", TEACHER_STEPS)
    if not student or not full:
        return []
    return [
        f"One image takes {seconds(student)} at {_steps(steps)}, and {seconds(full)} with the teacher's {TEACHER_STEPS} steps, "
        f"{full / student:.0f} times as long."
    ]


def seconds(value: float) -> str:
    """Format a time: "0.23 s", "41 ms", "2 min 5 s"."""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 100:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


class _Flaw(NamedTuple):
    """What is odd about images, in a word, and the number that shows it."""

    word: str
    number: str


def _flaws(results: Results, steps: int) -> list[_Flaw]:
    """Return what deviates notably from the teacher's images at a number of steps, although it may be usable."""
    words = {
        "sharpness": ("blurry", "noisy or over-sharpened"),
        "saturation": ("washed out", "oversaturated"),
        "diversity": ("too similar to each other", "more varied than the teacher's"),
    }
    flaws = []
    for name, (low, high) in words.items():
        value = results.number(name, "student", steps)
        if value is not None and abs(value - 1) > NOTABLE:
            flaws.append(_Flaw(low if value < 1 else high, f"{name} {value:g} of the teacher's"))
    return flaws


def _shortcomings(results: Results, steps: int, grade: Grade, chosen: int) -> list[str]:
    """Say what an insufficient number of steps lacks, and what is odd about a sufficient one."""
    parts = [f"{flaw.word} ({flaw.number})" for flaw in _flaws(results, steps)]
    if grade != "enough":
        at, best = results.number("ssim", "student", steps), results.number("ssim", "student", chosen)
        if at is not None and best is not None and at < best:
            parts.append(f"further from the teacher's images (SSIM {at:g}, and {best:g} at {_steps(chosen)})")
    return [f"At {_steps(steps)}, images are {' and '.join(parts)}."] if parts else []
