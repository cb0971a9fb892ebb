"""Every source becomes latents and embeddings on disk, once; training then reads them at random and in exact order.

A cache is a folder of chunks, one safetensors file for each CHUNK members of the source, named by the members it covers.
A chunk is written aside and renamed, so that an interrupted preparation goes on where it stopped, ranks can share the work,
and a later run with the same teacher, source and transform finds everything ready.

Shapes: n samples of a chunk, u distinct captions of it, B batch, C h w latents.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.chunks import draw_spacing, is_complete, write_chunk
from lcmdistill.data.eviction import cache_evicted_error
from lcmdistill.data.sources.registry import kind_of
from lcmdistill.data.sources.remote import REMOTE
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.sources.webdataset import shard_urls
from lcmdistill.data.survey import CHUNK, GIVE_UP_AFTER, SourceReport, _members, _nothing_usable, _sizes
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.errors import UsageError

_LAYOUT = 2
"of a chunk's file: another number makes other folders, so that no old chunk is taken for a new one"


def cache_folder(spec: str, config: DataConfig, teacher: Teacher, seed: int) -> Path:
    """Where a source's chunks lie: a hash of the teacher's weights, the source's content and everything that shapes it."""
    draws = kind_of(spec) == "teacher"
    about: dict[str, Any] = {"teacher": teacher.fingerprint(with_network=draws), "resolution": config.resolution}
    about["layout"] = _LAYOUT
    if draws:
        own = teacher.own_prompts if config.prompts is None else ()
        prompts = "\n".join(own or read_prompts(config.prompts))
        about |= {"prompts": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(), "seed": seed}
        about |= {
            "guidance_scale": config.guidance_scale,
            "teacher_steps": config.teacher_steps,
            **draw_spacing(teacher),
        }
    else:
        about |= {"source": spec, "files": _listing(spec), "min_size": config.min_size}
        about |= {"crop": config.crop, "flip": config.flip, "max_watermark": config.max_watermark}
        if config.crop == "random" or config.flip or teacher.condition_is_random:
            about["seed"] = seed
        if kind_of(spec) == "folder":
            about["order"] = seed
        if sizes := _sizes(spec, config, teacher):
            about["buckets"] = sizes
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache_root(config) / "latents" / digest


def cache_root(config: DataConfig) -> Path:
    return Path(config.cache_dir or os.environ.get("LCMDISTILL_CACHE") or "~/.cache/lcmdistill").expanduser()


def check_cache(config: DataConfig) -> None:
    """Raise UsageError if the place where latents are kept cannot be written to."""
    folder = cache_root(config).absolute() / "latents"
    above = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        problem = "no permission" if above.is_dir() else "a file"
        raise UsageError(
            f"data.cache_dir {cache_root(config)} cannot be written to ({above}: {problem}); name another folder with "
            "--set data.cache_dir=FOLDER"
        )


def _listing(spec: str) -> list[tuple[str, int, int]]:
    """Name, size and time of every local file of a source; URLs are known by their spelling alone.

    The bundled files have no time: it would be that of the installation.
    """
    if spec.startswith(REMOTE):
        return []
    bundled = kind_of(spec) == "tiny"
    root = Path(str(files("lcmdistill") / "assets" / "tiny-data")) if bundled else Path(spec).expanduser()
    paths = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else map(Path, shard_urls(spec))
    return [(p.name, p.stat().st_size, 0 if bundled else p.stat().st_mtime_ns) for p in paths]


def prepare(
    spec: str,
    config: DataConfig,
    teacher: Teacher,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write this rank's share of a source's missing chunks, and return their folder.

    dtype: what the teacher's network computes in where it draws its own latents; VAE and text encoder stay in fp32.
    Raises UsageError if the first GIVE_UP_AFTER members hold nothing usable, RunError if the source breaks off.
    """
    folder = cache_folder(spec, config, teacher, seed)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = _chunks_up_to(folder, config.max_samples)
    if _whole(folder, config.max_samples).is_file() and _unbroken(chunks) and all(map(is_complete, chunks)):
        return folder
    members = enumerate(_members(spec, config, seed, teacher.own_prompts))
    kept, rejected, sizes = 0, Counter(), _sizes(spec, config, teacher)
    for number in itertools.count():
        chunk = list(itertools.islice(members, CHUNK))
        if not chunk:
            break
        path = folder / f"{number * CHUNK:08d}-{number * CHUNK + len(chunk):08d}.safetensors"
        if number % world == rank and not is_complete(path):
            samples: list[tuple[int, Sample]] = []
            dropped: Counter[str] = Counter()
            for place, member in chunk:
                outcome = check_sample(member, config, seed, place, teacher.rejects, sizes)
                if isinstance(outcome, Sample):
                    samples.append((place, outcome))
                else:
                    dropped[outcome.reason] += 1
            write_chunk(path, samples, dropped, teacher, config, seed, dtype, on_progress, bucketed=bool(sizes))
            kept, rejected = kept + len(samples), rejected + dropped
            if not kept and sum(rejected.values()) >= GIVE_UP_AFTER:
                raise _nothing_usable(spec, SourceReport(0, tuple(rejected.most_common()), False))
        on_progress(number * CHUNK + len(chunk))
    return folder


def mark_complete(folder: Path, count: int | None) -> None:
    """Note, once every rank is done, that the first `count` members are there: a later run need not read the source.

    Raises RunError if some are no longer there.
    """
    if not _unbroken(_chunks_up_to(folder, count)):
        raise cache_evicted_error(folder)
    _whole(folder, count).touch()


def _whole(folder: Path, count: int | None) -> Path:
    return folder / f"whole-{'all' if count is None else count}"


def _chunks_up_to(folder: Path, count: int | None) -> list[Path]:
    """The chunk files that together cover members 0 .. count, the longest of those that start at the same place."""
    by_start: dict[int, tuple[int, Path]] = {}
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        start, end = map(int, path.stem.split("-"))
        if count is None or end <= count:
            by_start[start] = max(by_start.get(start, (0, path)), (end, path))
    return [path for _, (_, path) in sorted(by_start.items())]


def _unbroken(chunks: Sequence[Path]) -> bool:
    """Whether each of the chunks begins where the one before it ends, and the first at the first member."""
    end = 0
    for start, following in (map(int, path.stem.split("-")) for path in chunks):
        if start != end:
            return False
        end = following
    return True
