"""Every source becomes latents and embeddings on disk, once; training then reads them at random and in exact order.

A cache is a folder of chunks, one safetensors file per CHUNK members of the source, named by the members it covers. A chunk is
written to a temporary name and renamed. An interrupted preparation therefore continues where it stopped, ranks can share the
work, and a later run with the same teacher, data and transform finds everything ready.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.buckets import buckets_for
from lcmdistill.data.chunks import CHUNK, draw_spacing, is_complete, write_chunk
from lcmdistill.data.eviction import cache_evicted_error, claim_folder
from lcmdistill.data.sources.base import Source
from lcmdistill.data.survey import GIVE_UP_AFTER, SourceReport, no_usable_samples_error
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.errors import UsageError

_CHUNK_NAME = re.compile("[0-9]{8,}-[0-9]{8,}")

READING = 0.5
"the share of an image's preparation that reading and cropping it counts for in the progress"

_LAYOUT = 3
"layout of a chunk's file: a new number makes new folders, so that no old chunk is taken for a new one"


def cache_folder(source: Source, config: DataConfig, teacher: Teacher, seed: int) -> Path:
    """Return the folder of a source's chunks.

    Its name is a hash of the teacher's weights, the source's content and every setting that shapes the latents.
    """
    cache_key: dict[str, Any] = {
        "layout": _LAYOUT,
        "teacher": teacher.fingerprint(with_network=source.is_generated and not source.prompts_only),
        "resolution": config.resolution,
        "source": source.fingerprint(),
    }
    if source.prompts_only:
        cache_key["prompts_only"] = True
    elif source.trajectory is not None:
        cache_key |= {"seed": seed, "trajectory": source.trajectory.cache_key()}
    elif source.is_generated:
        cache_key |= {"seed": seed, "guidance_scale": config.guidance_scale, "teacher_steps": config.teacher_steps}
        cache_key |= draw_spacing(teacher)
    else:
        cache_key |= {"crop": config.crop, "flip": config.flip}
        cache_key |= {"min_size": config.min_size, "max_watermark": config.max_watermark}
        if config.crop == "random" or config.flip or teacher.condition_is_random:
            cache_key["seed"] = seed
        if sizes := buckets_for(source, config, teacher.multiple):
            cache_key["buckets"] = sizes
    return cache_root(config) / "latents" / digest(cache_key)


def cache_root(config: DataConfig) -> Path:
    """Return the folder of all caches: `data.cache_dir`, $LCMDISTILL_CACHE, or ~/.cache/lcmdistill."""
    return Path(config.cache_dir or os.environ.get("LCMDISTILL_CACHE") or "~/.cache/lcmdistill").expanduser()


def check_cache(config: DataConfig) -> None:
    """Raise UsageError if the folder of the caches is not writable."""
    folder = cache_root(config).absolute() / "latents"
    above = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        problem = "no permission" if above.is_dir() else "a file"
        raise UsageError(
            f"data.cache_dir {cache_root(config)} cannot be written to ({above}: {problem}); choose another folder with "
            "--set data.cache_dir=FOLDER"
        )


def prepare(
    source: Source,
    config: DataConfig,
    teacher: Teacher,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Path:
    """Write this rank's share of a source's missing or damaged chunks.

    Args:
        source: Where the members come from.
        config: How they are transformed, and how many are prepared.
        teacher: Encodes them.
        seed: The run's seed.
        dtype: Of the teacher's network where it generates images; VAE and text encoder stay in fp32.
        rank: The index of this process.
        world: The number of processes.
        on_progress: Called with the number of members done; one that was read but not encoded yet counts half.

    Returns:
        The folder of the chunks.

    Raises:
        UsageError: If the first GIVE_UP_AFTER members have nothing usable.
        RunError: If the source cannot be read to its end.
    """
    folder = claim_folder(cache_folder(source, config, teacher, seed))
    chunks = chunk_paths(folder, config.max_samples)
    # Each rank checks its own share, and each file once.
    complete = {path: is_complete(path) for path in chunks if _span(path)[0] // CHUNK % world == rank}
    is_marked = _whole(folder, config.max_samples).is_file() and bool(chunks)  # all chunks may have been deleted
    if is_marked and _unbroken(chunks) and all(complete.values()):
        return folder
    members = enumerate(source.members(config.max_samples))
    num_kept, rejected, sizes = 0, Counter(), buckets_for(source, config, teacher.multiple)
    for number in itertools.count():
        chunk = list(itertools.islice(members, CHUNK))
        if not chunk:
            break
        start, share = number * CHUNK, READING if not source.is_generated else 0.0

        def encoded(done: float, start: int = start, share: float = share, count: int = len(chunk)) -> None:
            on_progress(start + share * count + (1 - share) * (done - start))

        path = folder / f"{number * CHUNK:08d}-{number * CHUNK + len(chunk):08d}.safetensors"
        if number % world == rank and not (complete[path] if path in complete else is_complete(path)):
            samples: list[tuple[int, Sample]] = []
            dropped: Counter[str] = Counter()
            for i, (place, member) in enumerate(chunk):
                on_progress(start + share * i)
                outcome = check_sample(member, config, seed, place, teacher.rejects, sizes)
                if isinstance(outcome, Sample):
                    samples.append((place, outcome))
                else:
                    dropped[outcome.reason] += 1
            kind = {"bucketed": bool(sizes), "prompts_only": source.prompts_only, "trajectory": source.trajectory}
            write_chunk(path, samples, dropped, teacher, config, seed, dtype, encoded, **kind)
            num_kept, rejected = num_kept + len(samples), rejected + dropped
            if not num_kept and sum(rejected.values()) >= GIVE_UP_AFTER:
                raise no_usable_samples_error(source, SourceReport(0, tuple(rejected.most_common()), False))
        on_progress(number * CHUNK + len(chunk))
    return folder


def mark_complete(folder: Path, count: int | None) -> None:
    """Note, once every rank is done, that the first `count` members exist: a later run need not read the source.

    Raises:
        RunError: If some were deleted meanwhile.
    """
    if not _unbroken(chunk_paths(folder, count)):
        raise cache_evicted_error(folder)
    _whole(folder, count).touch()


def chunk_paths(folder: Path, count: int | None) -> list[Path]:
    """Return the chunk files that together cover members 0 .. count, the longest of those that start at the same place."""
    by_start: dict[int, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not _CHUNK_NAME.fullmatch(path.stem):  # such as a copy that somebody made by hand
            continue
        start, end = _span(path)
        if count is None or end <= count:
            by_start[start] = max(by_start.get(start, (0, path)), (end, path))
    return [path for _, (_, path) in sorted(by_start.items())]


def _span(path: Path) -> tuple[int, int]:
    """Return the first member of a chunk's file, and the one after its last."""
    start, end = path.stem.split("-")
    return int(start), int(end)


def _whole(folder: Path, count: int | None) -> Path:
    return folder / f"whole-{'all' if count is None else count}"


def _unbroken(chunks: Sequence[Path]) -> bool:
    """Return whether each chunk starts where the previous one ends, and the first at the first member."""
    end = 0
    for start, following in map(_span, chunks):
        if start != end:
            return False
        end = following
    return True
