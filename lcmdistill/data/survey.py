"""Inspect the sources before a run: what is kept, what is dropped and why."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.buckets import buckets_for
from lcmdistill.data.chunks import CHUNK, size_of
from lcmdistill.data.sources.base import Source
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.family import needs_caption
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.utils.errors import UsageError

GIVE_UP_AFTER = 1024
"members of a source that are looked at before a source without a usable one is refused"


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's members.

    Attributes:
        kept: How many can be used.
        rejected: (reason, how many) of the others, the most frequent first.
        complete: Whether every member was looked at.
        cut: Captions of those kept that are longer than the text encoder reads.
        tokens: How many tokens the text encoder reads.
        buckets: ("HEIGHTxWIDTH" in pixels, how many kept), where there are several sizes.
    """

    kept: int = 0
    rejected: tuple[tuple[str, int], ...] = ()
    complete: bool = True
    cut: int = 0
    tokens: int = 0
    buckets: tuple[tuple[str, int], ...] = ()

    @property
    def num_rejected(self) -> int:
        """How many members cannot be used."""
        return sum(count for _, count in self.rejected)

    @property
    def reasons(self) -> str:
        """The reasons with their counts: "3 x no caption, 1 x corrupt image"."""
        return ", ".join(f"{count} x {reason}" for reason, count in self.rejected)

    def __str__(self) -> str:
        more = "" if self.complete else " (of those looked at)"
        more += f"; {self.cut} captions are truncated to {self.tokens} tokens" if self.cut else ""
        more += "; " + ", ".join(f"{count} at {size}" for size, count in self.buckets) if self.buckets else ""
        return f"{self.kept} kept, {self.num_rejected} dropped{f': {self.reasons}' if self.rejected else ''}{more}"


def survey(
    sources: Sequence[Source],
    config: DataConfig,
    seed: int,
    *,
    seconds: float,
    first_only: bool = False,
    rejects: Callable[[str], str | None] = needs_caption,
    teacher: Teacher | None = None,
) -> list[SourceReport]:
    """Decode the members of each source and count what can be used.

    Args:
        sources: The sources.
        config: Filters, resolution and the most members to look at.
        seed: The run's seed.
        seconds: The most time to spend on each source.
        first_only: Stop at the first usable member.
        rejects: The teacher's check of a caption.
        teacher: Where it is known already, its buckets and its text encoder's limit are reported, too.

    Returns:
        A report per source.

    Raises:
        UsageError: If a source has nothing usable.
        RunError: If a source cannot be read.
    """
    reports = []
    for source in sources:
        source.check_reachable()
        kept, rejected, complete, end = 0, Counter(), True, time.monotonic() + seconds
        captions, frames = [], Counter()
        sizes = buckets_for(source, config, teacher.multiple) if teacher else []
        for place, member in enumerate(source.members(config.max_samples)):
            outcome = check_sample(member, config, seed, place, rejects, sizes)
            if isinstance(outcome, Sample):
                kept += 1
                captions.append(outcome.caption)
                frames[size_of(outcome)] += 1
            else:
                rejected[outcome.reason] += 1
            out_of_time = time.monotonic() > end and place >= CHUNK
            if (first_only and kept) or out_of_time or (not kept and place + 1 >= GIVE_UP_AFTER):
                complete = False
                break
        cut, tokens = (
            (count_truncated(teacher.pipeline, captions), token_limit(teacher.pipeline)) if teacher else (0, 0)
        )
        counts = tuple(sorted(frames.items())) if sizes else ()
        report = SourceReport(kept, tuple(rejected.most_common()), complete, cut, tokens, counts)
        if not kept:
            raise no_usable_samples_error(source, report)
        reports.append(report)
    return reports


def no_usable_samples_error(source: Source, report: SourceReport) -> UsageError:
    """Return the error for a source of which nothing can be used."""
    if not report.num_rejected:
        return UsageError(f"--data {source.label} is empty; it needs images with captions")
    return UsageError(
        f"--data {source.label}: none of {report.num_rejected} samples can be used ({report.reasons}); each needs an image "
        "and a caption (a .txt or .caption file of the same name, or metadata.jsonl)"
    )


def unused_samples(source: Source, config: DataConfig, report: SourceReport, *, takes_prompts: bool = True) -> str:
    """Return what to add to a source's report where `data.max_samples` leaves members out, "" where it does not.

    Args:
        source: The source.
        config: Holds `max_samples`.
        report: What became of the members that were looked at.
        takes_prompts: Whether the teacher takes prompts; one that does not generates its classes in turn.
    """
    limit = config.max_samples
    if limit is None or (source.is_generated and not takes_prompts and config.prompts is None):
        return ""
    total, looked = source.count(), report.kept + report.num_rejected
    if looked < limit if total is None else total <= limit:
        return ""
    taken = f"the first {limit}" if total is None else f"{limit} of {total}"
    return f"; {taken} used (data.max_samples, by default as many as the steps of a run can use)"


def members_of(source: Source, config: DataConfig) -> int | None:
    """Return how many members of a source a run prepares; None where only reading all of them would tell."""
    limit, count = config.max_samples, source.count()
    return limit if source.is_generated else None if count is None else min(count, limit or count)


def usable_count(
    config: DataConfig, sources: Sequence[Source], samples_needed: int, *, one_per_prompt: bool = True
) -> int:
    """Return how many samples to prepare per source: `data.max_samples`, or what a run can use in whole chunks.

    Args:
        config: Holds `max_samples`.
        sources: The run's sources.
        samples_needed: How many samples the run visits.
        one_per_prompt: Whether one sample per prompt is enough where the teacher generates all images.
    """
    if config.max_samples is not None:
        return config.max_samples
    needed = -(-samples_needed // CHUNK) * CHUNK
    if one_per_prompt and all(source.is_generated for source in sources):
        counts = [source.count() for source in sources]
        return needed if None in counts else min(needed, max(count or 0 for count in counts))
    return needed
