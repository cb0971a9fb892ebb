"""Inspect the sources before a run: what is kept, what is dropped and why."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.buckets import Size, bucket_sizes
from lcmdistill.data.chunks import size_of
from lcmdistill.data.sources.base import Member
from lcmdistill.data.sources.registry import kind_of, listed, open_source
from lcmdistill.data.sources.remote import check_reachable
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.sources.webdataset import shard_urls
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.teachers.base import Teacher, needs_caption
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.utils.errors import UsageError

CHUNK = 128

GIVE_UP_AFTER = 1024
"so many members of a source without a usable one, and it is given up"


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's members."""

    kept: int = 0
    rejected: tuple[tuple[str, int], ...] = ()
    complete: bool = True
    "whether every member was looked at"
    cut: int = 0
    "captions of those kept that are longer than the text encoder reads"
    tokens: int = 0
    "how much it reads"
    buckets: tuple[tuple[str, int], ...] = ()
    "how many were kept of each size, where there are several: HEIGHTxWIDTH in pixels"

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} x {reason}" for reason, count in self.rejected)
        more = "" if self.complete else " (of those looked at)"
        more += f"; {self.cut} captions are cut at {self.tokens} tokens" if self.cut else ""
        more += "; " + ", ".join(f"{count} at {size}" for size, count in self.buckets) if self.buckets else ""
        return f"{self.kept} kept, {sum(c for _, c in self.rejected)} dropped{f': {dropped}' if dropped else ''}{more}"


def survey(
    config: DataConfig,
    seed: int,
    *,
    seconds: float,
    first_only: bool = False,
    rejects: Callable[[str], str | None] = needs_caption,
    own_prompts: Sequence[str] = (),
    teacher: Teacher | None = None,
) -> list[SourceReport]:
    """Look at each source's members, decoding them, for at most `seconds` each; `first_only` stops at a usable one.

    rejects, own_prompts: the teacher's; teacher: itself, where it is known, for what its text encoder and buckets make of them.
    Raises UsageError if a source holds nothing usable, RunError if one cannot be reached.
    """
    reports = []
    for spec in config.sources:
        if kind_of(spec) == "shards":
            check_reachable(shard_urls(spec))
        kept, rejected, complete, end = 0, Counter(), True, time.monotonic() + seconds
        captions, frames, sizes = [], Counter(), _sizes(spec, config, teacher) if teacher else []
        for place, member in enumerate(_members(spec, config, seed, own_prompts)):
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
        told = (count_truncated(teacher.pipeline, captions), token_limit(teacher.pipeline)) if teacher else (0, 0)
        counts = tuple(sorted(frames.items())) if sizes else ()
        report = SourceReport(kept, tuple(rejected.most_common()), complete, *told, counts)
        if not kept:
            raise _nothing_usable(spec, report)
        reports.append(report)
    return reports


def _nothing_usable(spec: str, report: SourceReport) -> UsageError:
    looked = sum(count for _, count in report.rejected)
    if not looked:
        return UsageError(f"--data {spec} is empty; it needs images with captions")
    reasons = ", ".join(f"{count} x {reason}" for reason, count in report.rejected)
    return UsageError(
        f"--data {spec}: none of {looked} samples can be used ({reasons}); each needs an image and a caption"
    )


def _members(spec: str, config: DataConfig, seed: int, own_prompts: Sequence[str]) -> Iterator[Member]:
    """A source's members as far as `data.max_samples` goes; prompts for the teacher go round as often as it asks."""
    members = open_source(spec, config.prompts, seed)
    if kind_of(spec) == "teacher":
        if own_prompts and config.prompts is None:
            members = (Member(str(i), None, prompt) for i, prompt in enumerate(own_prompts))
        members = members if config.max_samples is None else itertools.cycle(members)
    return itertools.islice(members, config.max_samples)


def unused_samples(spec: str, config: DataConfig, report: SourceReport, *, takes_prompts: bool = True) -> str:
    """What to say, after a source's report, where `data.max_samples` leaves members of it out."""
    if kind_of(spec) == "teacher" and not takes_prompts and config.prompts is None:
        return ""  # it draws its classes in turn, or whatever it draws
    total, looked = listed(spec, config.prompts), report.kept + sum(count for _, count in report.rejected)
    if config.max_samples is None or (looked < config.max_samples if total is None else total <= config.max_samples):
        return ""
    taken = f"the first {config.max_samples}" if total is None else f"{config.max_samples} of {total}"
    return f"; {taken} taken (data.max_samples, by default as many as the run can use; a larger one takes more)"


def _sizes(spec: str, config: DataConfig, teacher: Teacher) -> list[Size]:
    """The buckets of a source; none of what a teacher draws, which is square."""
    return [] if kind_of(spec) == "teacher" else bucket_sizes(config, teacher.multiple)


def usable_count(config: DataConfig, samples_needed: int, *, one_a_prompt: bool = True) -> int:
    """Return `data.max_samples`, or what a run of `samples_needed` can use in whole chunks; one per prompt for `teacher`."""
    if config.max_samples is not None:
        return config.max_samples
    needed = -(-samples_needed // CHUNK) * CHUNK
    if one_a_prompt and all(kind_of(spec) == "teacher" for spec in config.sources):
        return min(needed, len(read_prompts(config.prompts)))
    return needed
