"""The user's own captions of a run: some are held out of training, for validation and evaluation.

The latent cache holds every sample, so another `data.holdout` prepares nothing again. A run records its captions in
RUN/captions.json, and a resumed run holds out those.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.sources.base import Source
from lcmdistill.data.sources.bundled import BundledShards
from lcmdistill.data.sources.captions import Captions
from lcmdistill.data.sources.teacher import TeacherSource
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.checksums import checked_json, read_checked_json
from lcmdistill.utils.errors import RunError
from lcmdistill.utils.units import counted

logger = logging.getLogger(__name__)

FILE = "captions.json"
"the record's name in a run folder"

SMALLEST = 40
"samples below which none are held out: they would be too few to judge by, and are missed in training"

LEAST, MOST = 4, 200
"samples that are held out at least and at most"


@dataclass(frozen=True)
class RunCaptions:
    """The user's own captions that a run is validated and evaluated with.

    Attributes:
        captions: Distinct captions, at most MOST; () for bundled data.
        held_out: Whether training never sees them. Otherwise there were too few to hold some out, or `data.holdout` was 0.
    """

    captions: tuple[str, ...] = ()
    held_out: bool = False


def is_own(source: Source) -> bool:
    """Return whether a source has the user's own captions, not those that the package or a teacher comes with."""
    inner = source.source if isinstance(source, Captions) else source
    if isinstance(inner, TeacherSource):
        return inner.options.prompts is not None
    return not isinstance(inner, BundledShards)


def choose_captions(captions: Sequence[str | None], share: float) -> RunCaptions:
    """Choose the captions to hold out. All samples of a caption are held out together.

    The choice depends on the captions only: runs on the same data hold out the same ones, whatever their seed.

    Args:
        captions: The caption of each sample; None where it is not the user's own.
        share: The share of the samples to hold out.
    """
    counts = Counter(caption for caption in captions if caption is not None)
    in_order = sorted(counts, key=lambda caption: derive_seed(0, "holdout", caption))
    if share <= 0 or counts.total() < SMALLEST:
        return RunCaptions(tuple(in_order[:MOST]))
    left, chosen = min(MOST, max(LEAST, round(share * counts.total()))), []
    for caption in in_order:
        if counts[caption] <= left:
            left -= counts[caption]
            chosen.append(caption)
    return RunCaptions(tuple(chosen), True) if chosen else RunCaptions(tuple(in_order[:MOST]))


def hold_out(folder: Path, dataset: LatentDataset, own: Sequence[bool], share: float) -> RunCaptions:
    """Remove the held-out samples from a run's data set. A resumed run holds out what it was started with.

    Args:
        folder: The run folder.
        dataset: All samples of the run.
        own: Per source of the data set, whether it has the user's own captions.
        share: `data.holdout`, 0 for a run that an earlier version started.

    Returns:
        The captions to record with `record_captions`, once every process has called this.
    """
    captions = dataset.captions(own)
    record = read_captions(folder)
    if record is None:  # a new run, or its record was lost: the same share of the same captions holds out the same ones
        record = choose_captions(captions, share)
    if record.held_out:
        held = set(record.captions)
        dataset.leave_out([i for i, caption in enumerate(captions) if caption in held])
    return record


def record_captions(folder: Path, record: RunCaptions, held_out: int) -> None:
    """Record the captions in a run's folder, if there are any, and log how many samples are held out."""
    if record.captions:
        write_text(folder / FILE, checked_json(asdict(record)))
    if held_out:
        logger.info(
            f"{held_out} samples, of {counted(len(record.captions), 'caption')}, are held out for validation and "
            "evaluation (data.holdout)"
        )


def read_captions(folder: Path) -> RunCaptions | None:
    """Return the captions that a run recorded, None without a record.

    Raises:
        RunError: The record is damaged.
    """
    try:
        values = read_checked_json(folder / FILE)
        return RunCaptions(tuple(values["captions"]), bool(values["held_out"]))
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{folder / FILE} is damaged, and which captions are held out of training is not known; restore the file"
        ) from error
