"""The prompts of an evaluation: held out of training, and of the user's own data where a run has some."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from lcmdistill.data.holdout import RunCaptions, read_captions
from lcmdistill.data.sources.registry import is_generated
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions
from lcmdistill.sampling.prompts import default_prompts
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.naming import resolve_alias
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)

DEFAULT_IMAGES, DEFAULT_IMAGES_SMALL = 16, 50
"images per point: minutes on a GPU for large networks, minutes on two cores for small ones"

SMALL_NETWORK = 50_000_000
"parameters below which a network is fast enough for more images"


@dataclass(frozen=True)
class PromptChoice:
    """The prompts of an evaluation.

    Attributes:
        prompts: One prompt per image.
        origin: Where they come from, in words that follow "12 prompts".
        are_own: Whether they are captions of the runs' own data.
        held_out: Whether the runs never saw them.
    """

    prompts: tuple[str, ...]
    origin: str
    are_own: bool = False
    held_out: bool = True


def choose_prompts(runs: Sequence[EvaluatedRun], options: EvaluationOptions, teacher: Teacher) -> PromptChoice:
    """Choose one prompt per image: of --prompts, captions of the runs' own data, or those of the teacher or the package.

    Few images are spread over the prompts; many repeat them. Prompts of a file that a run is known to have used are dropped.
    A class-conditional network gets its class names, and an unconditional one gets row labels.

    Raises:
        UsageError: No prompt remains.
    """
    parameters = sum(p.numel() for p in teacher.network.parameters())
    count = options.num_images or (DEFAULT_IMAGES_SMALL if parameters < SMALL_NETWORK else DEFAULT_IMAGES)
    if teacher.in_pixels and options.prompts is None:
        names = default_prompts(None, teacher.pipeline)
        return PromptChoice(_spread(names, count), "", held_out=False)
    own = common_captions([read_captions(run.run) for run in runs]) if options.prompts is None else RunCaptions()
    if own.captions:
        origin = "held out of the run's own data" if own.held_out else "of the run's own data, which training saw"
        if not own.held_out:
            logger.info(
                "the captions of the run's own data were all trained on: too few to hold some out, or data.holdout is 0"
            )
        return PromptChoice(_spread(own.captions, count), origin, are_own=True, held_out=own.held_out)
    of_teacher = Path(resolve_alias(runs[0].config.teacher.model)) / "prompts-heldout.txt"
    bundled = Path(__file__).parent.parent / "assets" / "prompts-heldout.txt"
    path = options.prompts or str(of_teacher if of_teacher.is_file() else bundled)
    files = [run.config.data.prompts for run in runs if any(map(is_generated, run.config.data.sources))]
    trained = {prompt for file in files for prompt in read_prompts(file)}
    requested = read_prompts(path)
    prompts = [prompt for prompt in requested if prompt not in trained]
    if not prompts:
        subject = "the run was" if len(runs) == 1 else "the runs were"
        raise UsageError(f"--prompts {path}: {subject} trained on all of these prompts; specify others")
    if len(prompts) < len(requested):
        logger.info(f"skipping {len(requested) - len(prompts)} of {len(requested)} prompts that were used in training")
    origin = "that were held out of training"
    if options.prompts is None and not of_teacher.is_file():
        origin += ", of a bundled list"
    return PromptChoice(_spread(prompts, count), origin)


def common_captions(records: Sequence[RunCaptions | None]) -> RunCaptions:
    """Return the captions that several runs can be evaluated with; none if they share none.

    They are held out if every run holds them out.
    """
    known = [record for record in records if record is not None and record.captions]
    if not known or len(known) < len(records):
        return RunCaptions()
    shared = reduce(set.intersection, (set(record.captions) for record in known))
    captions = tuple(caption for caption in known[0].captions if caption in shared)
    return RunCaptions(captions, all(record.held_out for record in known)) if captions else RunCaptions()


def _spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """Return `count` prompts: some that are spread over all, or all of them repeated."""
    return tuple(prompts[i * len(prompts) // count if count < len(prompts) else i % len(prompts)] for i in range(count))
