"""The progress of an evaluation: how many images are done, what is generated in words, and the time left."""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from lcmdistill.evaluation.latents import batches, student_latents
from lcmdistill.evaluation.self_consistency import curve_evaluations
from lcmdistill.evaluation.sweep import SamplerPair, Sweep, SweepPoint
from lcmdistill.utils.logging import Progress
from lcmdistill.utils.units import counted

logger = logging.getLogger(__name__)

clock = time.monotonic

SAMPLERS = {"student": "student", "teacher": "teacher", "trailing": "teacher with trailing time steps"}
"the samplers of a sweep, in words"


def describe_point(point: SweepPoint) -> str:
    """Return a point of a sweep in words: "teacher, 50 steps, guidance scale 7.5"."""
    return f"{SAMPLERS[point.sampler]}, {counted(point.steps, 'step')}, guidance scale {point.guidance_scale:g}"


class ImageSeconds(NamedTuple):
    """Seconds per image: of one evaluation of the network, and of decoding it."""

    evaluation: float
    decode: float


def measure_image_seconds(pair: SamplerPair, prompts: Sequence[str]) -> ImageSeconds:
    """Measure one batch of the student. It runs twice, and the second time counts."""
    indices, noise = next(batches(pair.noise, pair.batch_size))
    some, seconds = [prompts[i] for i in indices], ImageSeconds(0.0, 0.0)
    for _ in range(2):
        began = clock()
        latents = student_latents(pair.pipeline, some, noise, steps=1, guidance_scale=1.0, seed=0, batch_size=len(some))
        between = clock()
        float(pair.teacher.decode(latents).sum())
        seconds = ImageSeconds((between - began) / len(some), (clock() - between) / len(some))
    return seconds


class SweepProgress:
    """The progress of one sweep, which `sweep_run` reports to.

    Args:
        sweep: The sweep.
        each: The measured seconds per image.
        applies_cfg: Whether the teacher's guidance is classifier-free.
    """

    def __init__(self, sweep: Sweep, each: ImageSeconds, *, applies_cfg: bool = True) -> None:
        self._count, self._each = len(sweep.prompts), each
        self._generating = {
            point: point.evaluations(applies_cfg=applies_cfg) * each.evaluation for point in sweep.points()
        }
        self._left = {point: self._count * (generating + each.decode) for point, generating in self._generating.items()}
        self._images = dict.fromkeys(self._left, self._count)
        self._curve = curve_evaluations(self._count) * each.evaluation
        self._done, self._began = 0.0, clock()
        self._bar = Progress()
        self._after = 0.0

    @property
    def total(self) -> int:
        """The images of the sweep."""
        return self._count * len(self._left)

    @property
    def seconds(self) -> float:
        """The estimated seconds, if nothing is cached."""
        return sum(self._left.values()) + self._curve

    @property
    def student_seconds(self) -> float:
        """The estimated seconds of the student's points: of a second run with the same teacher."""
        return sum(value for point, value in self._left.items() if point.sampler == "student") + self._curve / 3

    def show(self, bar: Progress, after: float) -> None:
        """Show the progress on a bar. after: the estimated seconds of what follows the sweep."""
        self._bar, self._after, self._began = bar, after, clock()
        self._update("")

    def starts(self, point: SweepPoint) -> None:
        """See `SweepObserver`."""
        self._update(describe_point(point))
        if not self._bar.visible:
            logger.info(f"generating {counted(self._count, 'image')}: {describe_point(point)}  {self._bar.left_text}")

    def generated(self, point: SweepPoint, images: int) -> None:
        """See `SweepObserver`."""
        self._take(point, images * self._generating[point], images)

    def finished(self, point: SweepPoint, *, measured: bool) -> None:
        """See `SweepObserver`."""
        if not measured:  # all of it was there
            self._left[point] = 0.0
        elif self._left[point] > 0:
            self._take(point, self._count * self._each.decode, 0)
        self._left[point], self._images[point] = 0.0, 0
        self._update(describe_point(point))

    def _take(self, point: SweepPoint, seconds: float, images: int) -> None:
        self._done += seconds
        self._left[point] = max(0.0, self._left[point] - seconds)
        self._images[point] = max(0, self._images[point] - images)
        self._update(describe_point(point))

    def _update(self, note: str) -> None:
        pace = (clock() - self._began) / self._done if self._done else 1.0
        done = self.total - sum(self._images.values())
        self._bar.update(done, note, left=pace * (self.seconds + self._after))
