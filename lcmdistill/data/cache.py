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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.batch import Conditioning
from lcmdistill.data.buckets import Size, bucket_sizes
from lcmdistill.data.chunks import PROMPT, SAMPLE, draw_spacing, is_whole, size_of, write_chunk
from lcmdistill.data.order import Shape
from lcmdistill.data.remote import REMOTE, check_reachable
from lcmdistill.data.room import emptied
from lcmdistill.data.sources import Member, kind_of, listed, open_source, read_prompts, shard_urls
from lcmdistill.data.transforms import Sample, judge
from lcmdistill.errors import UsageError
from lcmdistill.settings import DataConfig
from lcmdistill.teachers.base import Teacher, needs_caption
from lcmdistill.teachers.prompts import count_cut, token_limit

CHUNK = 128
GIVE_UP_AFTER = 1024
"so many members of a source without a usable one, and it is given up"
_LAYOUT = 2
"of a chunk's file: another number makes other folders, so that no old chunk is taken for a new one"


@dataclass(frozen=True)
class Report:
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
    refuses: Callable[[str], str | None] = needs_caption,
    own_prompts: Sequence[str] = (),
    teacher: Teacher | None = None,
) -> list[Report]:
    """Look at each source's members, decoding them, for at most `seconds` each; `first_only` stops at a usable one.

    refuses, own_prompts: the teacher's; teacher: itself, where it is known, for what its text encoder and buckets make of them.
    Raises UsageError if a source holds nothing usable, RunError if one cannot be reached.
    """
    reports = []
    for spec in config.sources:
        if kind_of(spec) == "shards":
            check_reachable(shard_urls(spec))
        kept, rejected, complete, end = 0, Counter(), True, time.monotonic() + seconds
        captions, frames, sizes = [], Counter(), _sizes(spec, config, teacher) if teacher else []
        for place, member in enumerate(_members(spec, config, seed, own_prompts)):
            outcome = judge(member, config, seed, place, refuses, sizes)
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
        told = (count_cut(teacher.pipeline, captions), token_limit(teacher.pipeline)) if teacher else (0, 0)
        counts = tuple(sorted(frames.items())) if sizes else ()
        report = Report(kept, tuple(rejected.most_common()), complete, *told, counts)
        if not kept:
            raise _nothing_usable(spec, report)
        reports.append(report)
    return reports


def _nothing_usable(spec: str, report: Report) -> UsageError:
    looked = sum(count for _, count in report.rejected)
    if not looked:
        return UsageError(f"--data {spec} is empty; it needs images with captions")
    reasons = ", ".join(f"{count} x {reason}" for reason, count in report.rejected)
    return UsageError(
        f"--data {spec}: none of {looked} samples can be used ({reasons}); each needs an image and a caption"
    )


def _members(spec: str, config: DataConfig, seed: int, own_prompts: Sequence[str]) -> Iterator[Member]:
    """A source's members as far as `data.count` goes; prompts for the teacher go round as often as it asks."""
    members = open_source(spec, config.prompts, seed)
    if kind_of(spec) == "teacher":
        if own_prompts and config.prompts is None:
            members = (Member(str(i), None, prompt) for i, prompt in enumerate(own_prompts))
        members = members if config.count is None else itertools.cycle(members)
    return itertools.islice(members, config.count)


def left_out(spec: str, config: DataConfig, report: Report, *, takes_prompts: bool = True) -> str:
    """What to say, after a source's report, where `data.count` leaves members of it out."""
    if kind_of(spec) == "teacher" and not takes_prompts and config.prompts is None:
        return ""  # it draws its classes in turn, or whatever it draws
    total, looked = listed(spec, config.prompts), report.kept + sum(count for _, count in report.rejected)
    if config.count is None or (looked < config.count if total is None else total <= config.count):
        return ""
    taken = f"the first {config.count}" if total is None else f"{config.count} of {total}"
    return f"; {taken} taken (data.count, by default as many as the run can use; a larger one takes more)"


def _sizes(spec: str, config: DataConfig, teacher: Teacher) -> list[Size]:
    """The buckets of a source; none of what a teacher draws, which is square."""
    return [] if kind_of(spec) == "teacher" else bucket_sizes(config, teacher.multiple)


def usable_count(config: DataConfig, samples_needed: int, *, one_a_prompt: bool = True) -> int:
    """`data.count`, or as many members as a run of `samples_needed` can use, in whole chunks; of `teacher` one a prompt."""
    if config.count is not None:
        return config.count
    needed = -(-samples_needed // CHUNK) * CHUNK
    if one_a_prompt and all(kind_of(spec) == "teacher" for spec in config.sources):
        return min(needed, len(read_prompts(config.prompts)))
    return needed


def cache_folder(spec: str, config: DataConfig, teacher: Teacher, seed: int) -> Path:
    """Where a source's chunks lie: a hash of the teacher's weights, the source's content and everything that shapes it."""
    draws = kind_of(spec) == "teacher"
    about: dict[str, Any] = {"teacher": teacher.fingerprint(with_network=draws), "resolution": config.resolution}
    about["layout"] = _LAYOUT
    if draws:
        own = teacher.own_prompts if config.prompts is None else ()
        prompts = "\n".join(own or read_prompts(config.prompts))
        about |= {"prompts": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(), "seed": seed}
        about |= {"guidance_scale": config.guidance_scale, "draw_steps": config.draw_steps, **draw_spacing(teacher)}
    else:
        about |= {"source": spec, "files": _listing(spec), "min_size": config.min_size}
        about |= {"crop": config.crop, "flip": config.flip, "max_watermark": config.max_watermark}
        if config.crop == "random" or config.flip or teacher.condition_is_drawn:
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
    chunks = _chunks_up_to(folder, config.count)
    if _whole(folder, config.count).is_file() and _unbroken(chunks) and all(map(is_whole, chunks)):
        return folder
    members = enumerate(_members(spec, config, seed, teacher.own_prompts))
    kept, rejected, sizes = 0, Counter(), _sizes(spec, config, teacher)
    for number in itertools.count():
        chunk = list(itertools.islice(members, CHUNK))
        if not chunk:
            break
        path = folder / f"{number * CHUNK:08d}-{number * CHUNK + len(chunk):08d}.safetensors"
        if number % world == rank and not is_whole(path):
            samples: list[tuple[int, Sample]] = []
            dropped: Counter[str] = Counter()
            for place, member in chunk:
                outcome = judge(member, config, seed, place, teacher.refuses, sizes)
                if isinstance(outcome, Sample):
                    samples.append((place, outcome))
                else:
                    dropped[outcome.reason] += 1
            write_chunk(path, samples, dropped, teacher, config, seed, dtype, on_progress, bucketed=bool(sizes))
            kept, rejected = kept + len(samples), rejected + dropped
            if not kept and sum(rejected.values()) >= GIVE_UP_AFTER:
                raise _nothing_usable(spec, Report(0, tuple(rejected.most_common()), False))
        on_progress(number * CHUNK + len(chunk))
    return folder


def mark_whole(folder: Path, count: int | None) -> None:
    """Note, once every rank is done, that the first `count` members are there: a later run need not read the source.

    Raises RunError if some are no longer there.
    """
    if not _unbroken(_chunks_up_to(folder, count)):
        raise emptied(folder)
    _whole(folder, count).touch()


def _whole(folder: Path, count: int | None) -> Path:
    return folder / f"whole-{'all' if count is None else count}"


class LatentDataset:
    """Prepared chunks as one random-access data set, memory-mapped."""

    def __init__(self, folders: Sequence[Path], counts: Sequence[int | None]) -> None:
        """counts: the most members of each folder to take, None for all; chunks beyond it belong to other runs."""
        self.folders = tuple(folders)
        self._chunks: list[Any] = []
        self._places: list[tuple[int, str, int]] = []
        self.shapes: list[Shape] = []
        "height and width of each sample's latents"
        self.reports: list[Report] = []
        for folder, count in zip(folders, counts, strict=True):
            kept, rejected, cut, tokens, buckets = 0, Counter(), 0, 0, Counter()
            for path in _chunks_up_to(folder, count):
                chunk = safe_open(path, framework="pt")
                report = json.loads(chunk.metadata()["report"])
                n, sizes = report["kept"], report.get("buckets", {})
                for group, many in {f"{size}/": many for size, many in sizes.items()}.items() or [("", n)]:
                    self._places += [(len(self._chunks), group, i) for i in range(many)]
                    self.shapes += [tuple(chunk.get_slice(f"{group}mean").get_shape()[2:])] * many if many else []
                self._chunks.append(chunk)
                kept, rejected, buckets = kept + n, rejected + Counter(report["rejected"]), buckets + Counter(sizes)
                cut, tokens = cut + report.get("cut", 0), report.get("tokens", tokens)
            told = True, cut, tokens, tuple(sorted(buckets.items()))
            self.reports.append(Report(kept, tuple(rejected.most_common()), *told))

    def __len__(self) -> int:
        return len(self._places)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Conditioning]:
        """(mean, std, conditioning) of samples of one shape: (B, C, h, w) twice, then what the network is told, in fp32."""
        mean, std, told = [], [], []
        for index in indices:
            number, group, i = self._places[index]
            chunk = self._chunks[number]
            mean.append(chunk.get_slice(f"{group}mean")[i])
            std.append(chunk.get_slice(f"{group}std")[i])
            row, keys = int(chunk.get_slice(f"{group}row")[i]), chunk.keys()
            at = {key: row if key.startswith(PROMPT) else i for key in keys if key.startswith((PROMPT, group + SAMPLE))}
            told.append({key.partition(".")[2]: chunk.get_slice(key)[place] for key, place in at.items()})
        cond = {name: torch.stack([c[name] for c in told]) for name in told[0]}
        return torch.stack(mean).float(), torch.stack(std).float(), Conditioning(cond).to("cpu", torch.float32)


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
