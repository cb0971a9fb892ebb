"""Whether guidance does anything to a student's pictures, by the pictures that a sweep has kept."""

from pathlib import Path

import numpy as np
from PIL import Image

from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results

BARELY = 0.25
"as a part of what it does to the teacher's pictures"

UNSEEN = 0.01
"mean difference of pixels, of 1, that nobody sees"


def guidance_note(results: Results, steps: int) -> str | None:
    """A sentence if pictures hardly change between the lowest and the highest guidance scale; None if they do, or there is one.

    steps: the student's, at which it is looked at.
    """
    low, high = min(results.about["guidance_scales"]), max(results.about["guidance_scales"])
    own = _change(results.pictures("student", steps, low), results.pictures("student", steps, high))
    its = _change(results.pictures("teacher", TEACHER_STEPS, low), results.pictures("teacher", TEACHER_STEPS, high))
    if own is None or its is None or low == high:
        return None
    between = f"Between guidance {low:g} and {high:g}"
    if its < UNSEEN:
        return f"{between} the teacher's own pictures hardly differ, by {its:.1%} of a pixel's range: guidance barely matters."
    if own < BARELY * its:
        return (
            f"{between} the student's pictures change by {own:.1%} of a pixel's range where the teacher's change by {its:.1%}: "
            "guidance barely acts on this student, and any scale will do. A longer training may teach it."
        )
    return None


def _change(some: list[Path], others: list[Path]) -> float | None:
    """The mean absolute difference of pictures of the same prompts, in [0, 1]; None without pictures."""
    if not some or len(some) != len(others):
        return None
    return float(np.mean([np.abs(_pixels(a) - _pixels(b)).mean() for a, b in zip(some, others, strict=True)]))


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
