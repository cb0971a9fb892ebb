"""What a sweep's numbers mean, in plain words: how many steps are enough, and what the others lack."""

from dataclasses import dataclass
from typing import Literal

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results

Grade = Literal["enough", "close", "not quite"]

JUDGES = ("fid", "kid", "lpips", "ssim")
"the measures that decide, where they were taken"

ENOUGH, CLOSE = 0.025, 0.1
"how far a number may lie from the student's best, as a part of the way from there to the teacher's single step"

FEW = 16
"images below which a small difference may be chance"

ODD = 0.2
"how far a ratio to the teacher may lie from 1 before it is worth a word"


@dataclass(frozen=True)
class Verdict:
    """grades: of each number of steps; enough: the fewest that are, None if that cannot be told; usable: whether it draws well
    at all.

    headline: one sentence; reasons: a few more.
    """

    grades: dict[int, Grade]
    enough: int | None
    usable: bool
    headline: str
    reasons: tuple[str, ...]


def verdict(results: Results) -> Verdict:
    """Judge a sweep at its first guidance scale.

    A number of steps is enough if by every judge it lies within ENOUGH of the best that the student does at any, or of what
    its teacher does at full steps: of the way from there to what the teacher draws in one step, which is hardly more than
    noise. More steps than a judge's best do no harm, even where an agreement with one path falls again.
    """
    judges = [name for name in JUDGES if _gap(results, name, results.steps[0]) is not None]
    gaps = {
        n: max((min(_gap(results, name, m) or 0.0 for m in results.steps if m <= n) for name in judges), default=0.0)
        for n in results.steps
    }
    grades: dict[int, Grade] = {
        n: "enough" if gap <= ENOUGH else "close" if gap <= CLOSE else "not quite" for n, gap in gaps.items()
    }
    chosen = next(n for n in results.steps if grades[n] == "enough")
    # One number of steps alone has nothing to be enough beside.
    enough = chosen if len(results.steps) > 1 else None
    # Its full steps' path is what a teacher keeps to, and a student leaves, the more steps both take: one number of steps
    # where the student keeps up shows that it draws. A single one shows nothing: there the teacher's is noise.
    shown = [n for n in results.steps if n > 1] or results.steps
    usable = all(any(_is_sound(results, name, n) for n in shown) for name in judges)
    reasons = [*_beside_the_teacher(results, chosen), *_time(results, chosen)]
    reasons += [text for n in results.steps if n <= chosen for text in _lacks(results, n, grades[n], chosen)]
    if (images := results.about.get("images", FEW)) < FEW:
        reasons.append(f"Of {images} images a small difference may be chance: --num-images {FEW} or more tell better.")
    return Verdict(grades, enough, usable, _headline(grades, enough, usable), tuple(reasons))


def _gap(results: Results, name: str, steps: int) -> float | None:
    """How far a number is from the student's best, 0, towards the teacher's single step, 1.

    No student need come nearer to real images than its teacher does at full steps: whatever is as near has no gap.
    """
    own = [results.number(name, "student", n) for n in results.steps]
    anchor, value = results.number(name, "teacher", min(results.steps)), results.number(name, "student", steps)
    known = [x for x in own if x is not None]
    if anchor is None or value is None or not known:
        return None
    if results.about["measures"][name]["better"] == "higher":
        best, short = max(known), max(known) - value
    else:
        full = results.full(name) if name in ("fid", "kid") else None
        best = max(min(known), full or 0.0)
        short = value - best
    return max(0.0, short) / abs(anchor - best) if anchor != best else 0.0


def _is_sound(results: Results, name: str, steps: int) -> bool:
    """Whether the student does as well as its teacher at full steps, or at least better than it does at as few."""
    value = results.number(name, "student", steps)
    rivals = [results.full(name)] if name in ("fid", "kid") else []
    rivals += [results.number(name, "teacher", steps)]
    known = [rival for rival in rivals if rival is not None]
    if value is None or not known:
        return True
    if results.about["measures"][name]["better"] == "higher":
        return value >= 0.9 * min(known)
    return value <= 1.1 * max(known)


def _headline(grades: dict[int, Grade], enough: int | None, usable: bool) -> str:
    if not usable:
        return "This student does not draw well yet: at as few steps, its teacher does better."
    if enough is None:
        return f"Nothing but {_steps(max(grades))} was drawn, and nothing tells whether more would be better."
    close = [n for n, grade in grades.items() if grade == "close"]
    short = [n for n, grade in grades.items() if grade == "not quite"]
    said = f"{_steps(enough)} {'is' if enough == 1 else 'are'} enough"
    if enough == max(grades):  # where nothing levelled off
        said = f"{_steps(enough)} are the best of those drawn, and more may be better"
    also = []
    if close:
        also.append(f"{_several(close)} {'comes' if close == [1] else 'come'} close")
    if short:
        also.append(f"{_several(short)} {'is' if short == [1] else 'are'} not quite there")
    return f"{said}; {', '.join(also)}." if also else f"{said}."


def _steps(n: int) -> str:
    return f"{n} step{'s' * (n > 1)}"


def _several(steps: list[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def _beside_the_teacher(results: Results, steps: int) -> list[str]:
    found = []
    for name in ("fid", "kid"):
        own, full = results.number(name, "student", steps), results.full(name)
        same = results.number(name, "teacher", steps)
        if own is None or full is None:
            continue
        label = results.about["measures"][name]["label"]
        how = "as near to real images as" if own <= 1.1 * full else "further from real images than"
        beside = "" if same is None else f" With {_steps(steps)} the teacher itself is at {same:g}."
        found.append(
            f"At {_steps(steps)} the student's pictures lie {how} the teacher's at {TEACHER_STEPS} "
            f"({label} {own:g} against {full:g}; lower is better).{beside}"
        )
        break
    own, same = results.number("ssim", "student", steps), results.number("ssim", "teacher", steps)
    if not found and own is not None and same is not None:
        than = "more" if own > same else "less"
        found.append(
            f"At {_steps(steps)} its pictures are {than} like the teacher's full ones than the teacher's own of as few "
            f"steps (SSIM {own:g} against {same:g}; 1 is the same picture)."
        )
    return found


def _time(results: Results, steps: int) -> list[str]:
    own, full = results.seconds("student", steps), results.seconds("teacher", TEACHER_STEPS)
    if not own or not full:
        return []
    return [
        f"An image takes {seconds(own)} at {_steps(steps)}, and {seconds(full)} at the teacher's {TEACHER_STEPS}: "
        f"{full / own:.0f} times as long."
    ]


def seconds(value: float) -> str:
    """A time that a person can read: "0.23 s", "41 ms", "2 min 5 s"."""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 100:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def _lacks(results: Results, steps: int, grade: Grade, chosen: int) -> list[str]:
    """What is wrong with a number of steps that is not enough, and what is odd about one that is."""
    words = {
        "sharpness": ("blurred", "noisy or over-sharpened"),
        "saturation": ("washed out", "garish"),
        "diversity": ("too much alike", "more varied than the teacher's"),
    }
    said = []
    for name, (low, high) in words.items():
        value = results.number(name, "student", steps)
        if value is not None and abs(value - 1) > ODD:
            said.append(f"{low if value < 1 else high} ({name} {value:g} of the teacher's)")
    if grade != "enough":
        at, best = results.number("ssim", "student", steps), results.number("ssim", "student", chosen)
        if at is not None and best is not None and at < best:
            said.append(f"further from the teacher's own pictures (SSIM {at:g} against {best:g} at {chosen})")
    return [f"At {_steps(steps)} pictures are {' and '.join(said)}."] if said else []
