"""Whether guidance changes a student's images, measured on the preview images of a sweep."""

from pathlib import Path

import numpy as np

from lcmdistill.data.images import ImageError, open_image
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.evaluation.results import Results

WEAK = 0.25
"change of the student's images relative to the teacher's, below which guidance counts as weak"

INVISIBLE = 0.01
"mean difference of pixels in [0, 1] that is not visible"


def guidance_note(results: Results, steps: int) -> str | None:
    """Return a sentence if images hardly change between the lowest and the highest guidance scale; otherwise None.

    Args:
        results: The results of a run.
        steps: The student's number of steps to look at.
    """
    low, high = min(results.info["guidance_scales"]), max(results.info["guidance_scales"])
    student = _change(results.previews("student", steps, low), results.previews("student", steps, high))
    teacher = _change(results.previews("teacher", TEACHER_STEPS, low), results.previews("teacher", TEACHER_STEPS, high))
    if student is None or teacher is None or low == high:
        return None
    between = f"Between guidance {low:g} and {high:g}"
    if teacher < INVISIBLE:
        return f"{between}, the teacher's images differ by only {teacher:.1%} of the pixel range: guidance has little effect."
    if student < WEAK * teacher:
        return (
            f"{between}, the student's images change by {student:.1%} of the pixel range and the teacher's by {teacher:.1%}: "
            "guidance has little effect on this student. Longer training may improve this."
        )
    return None


def _change(some: list[Path | None], others: list[Path | None]) -> float | None:
    """Return the mean absolute difference of images of the same prompts, in [0, 1]; None without images."""
    if not some or len(some) != len(others):
        return None
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a is not None and b is not None]
    try:
        return float(np.mean([np.abs(_pixels(a) - _pixels(b)).mean() for a, b in pairs])) if pairs else None
    except (ImageError, OSError):  # a damaged picture, which the report leaves out
        return None


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path), dtype=np.float32) / 255
