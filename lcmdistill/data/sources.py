"""Sources: each turns what the user named into a stream of members, in an order that never changes.

A member may be broken; nothing is decoded or judged here. What a shard's reader itself trips over is yielded as a member
with a `problem`, so that it can be counted.
"""

import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from lcmdistill.batch import derive_seed
from lcmdistill.data.remote import REMOTE, open_remote
from lcmdistill.errors import RunError, UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Member:
    """One raw sample. image: the encoded file, a path to it, or None where the teacher is to draw the caption."""

    key: str
    image: bytes | Path | None
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    "why the sample cannot be read, where its container already knows"


def shards(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """Webdataset shards: a folder of tars, a file, a URL (http, https, gs, hf, pipe:), each with brace expansion."""
    for url in shard_urls(spec):
        yield from _shard(url)


def shard_urls(spec: str) -> list[str]:
    """The shards that a --data argument names, in order. Raises UsageError for one that cannot be."""
    from webdataset.shardlists import expand_urls

    folder = Path(spec).expanduser()
    if folder.is_dir():
        return sorted(str(path) for path in folder.iterdir() if path.name.endswith(TAR_SUFFIXES))
    if spec.startswith("pipe:"):
        return [spec]
    urls = [url if url.startswith(REMOTE) else str(Path(url).expanduser()) for url in expand_urls(spec)]
    for url in urls:
        # A command is run only where it can be seen to be one.
        if url.startswith("pipe:") or (not url.startswith(REMOTE) and not Path(url).is_file()):
            raise UsageError(f"--data {spec}: there is no shard {url}")
    return urls


def _shard(url: str) -> Iterator[Member]:
    """One shard's members. What cannot be read of a file is told as a member; of anything else it is a RunError."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    remote, problems = url.startswith(REMOTE), []

    def count_and_go_on(error: Exception) -> bool:
        problems.append(f"unreadable part of a shard ({type(error).__name__})")
        return True

    def give_up(error: Exception) -> bool:
        if isinstance(error, RunError):
            raise RunError(error.args[0])  # without what the reader has added to it
        raise RunError(f"--data {url} cannot be read: what it sends is no whole tar ({type(error).__name__})")

    with open_remote(url) if remote else Path(url).open("rb") as stream:
        files = tar_file_expander([{"url": url, "stream": stream}], handler=give_up if remote else count_and_go_on)
        for sample in group_by_keys(files, handler=count_and_go_on):
            yield from _drain(problems)
            yield _shard_member(sample)
        yield from _drain(problems)
        while remote and stream.read(1 << 20):  # to its end, where a transport tells whether all went well
            pass


def _drain(problems: list[str]) -> Iterator[Member]:
    while problems:
        yield Member("", None, None, problem=problems.pop(0))


def _shard_member(sample: dict[str, Any]) -> Member:
    suffix = next((s for s in IMAGE_SUFFIXES if s[1:] in sample), None)
    meta: dict[str, Any] = {}
    if "json" in sample:
        try:
            loaded = json.loads(sample["json"])
            meta = loaded if isinstance(loaded, dict) else {}
        except ValueError:
            meta = {}
    text = sample["txt"].decode("utf-8", "replace") if "txt" in sample else meta.get("caption", meta.get("text"))
    image = sample[suffix[1:]] if suffix else None
    return Member(
        sample["__key__"], image, text if isinstance(text, str) else None, meta, None if suffix else "no image"
    )


def folder(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """Images with captions from metadata.jsonl or metadata.csv (file_name, text), else from a same-name .txt each."""
    root = Path(spec).expanduser()
    entries = _folder_entries(root)
    if seed is not None:
        # Whoever takes the first n of them has a choice from all of the folder, and more of them add to it.
        random.Random(derive_seed(seed, "choice")).shuffle(entries)
    for entry in entries:
        if isinstance(entry, Path):
            text = entry.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else None
            yield Member(str(entry.relative_to(root)), entry, caption)
        else:
            name = str(entry.get("file_name") or "")
            path, caption = root / name, entry.get("text", entry.get("caption"))
            problem = None if name and path.is_file() else "image file missing"
            yield Member(name, path, caption if isinstance(caption, str) else None, entry, problem)


def _folder_entries(root: Path) -> list[Any]:
    """The rows of a folder's metadata, or the paths of its images where there are none."""
    rows = _metadata_rows(root)
    if rows is not None:
        return rows
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _metadata_rows(root: Path) -> list[dict[str, Any]] | None:
    jsonl, table = root / "metadata.jsonl", root / "metadata.csv"
    if jsonl.is_file():
        try:
            lines = jsonl.read_text(encoding="utf-8-sig").split("\n")  # a caption may hold what splitlines() splits at
            rows = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise UsageError(f"{jsonl} is not valid JSON lines: {error}") from error
        if not all(isinstance(row, dict) for row in rows):
            raise UsageError(f'{jsonl} must hold one object a line, such as {{"file_name": "a.png", "text": "a cat"}}')
        return rows
    if table.is_file():
        try:
            with table.open(encoding="utf-8-sig", newline="") as handle:
                return list(csv.DictReader(handle))
        except (ValueError, csv.Error) as error:
            raise UsageError(f"{table} is not valid CSV: {error}") from error
    return None


def teacher(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """No data set: prompts only, one member each; the teacher draws the latents."""
    for i, prompt in enumerate(read_prompts(prompts)):
        yield Member(str(i), None, prompt)


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a file, one a line, blank lines skipped; None reads the bundled list.

    Raises UsageError if the file is absent or empty.
    """
    source = Path(path).expanduser() if path else Path(str(files("lcmdistill") / "assets" / "prompts.txt"))
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read ({error}); give a text file, one prompt a line") from error
    found = [line for line in lines if line]
    if not found:
        raise UsageError(f"--prompts {path} holds no prompt; give one a line")
    return found


def bundled(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """The emoji that the tiny teacher was trained on, as shards inside the package."""
    return shards(str(files("lcmdistill") / "assets" / "tiny-data"), prompts, seed)


# How --data is read: kind -> (spec, prompts file, seed of the order) -> members.
SOURCES: dict[str, Callable[[str, str | None, int | None], Iterator[Member]]] = {
    "teacher": teacher,
    "tiny": bundled,
    "shards": shards,
    "folder": folder,
}


def kind_of(spec: str) -> str:
    """Which of SOURCES reads a --data argument. Raises UsageError if none can."""
    if spec in ("teacher", "tiny"):
        return spec
    path = Path(spec).expanduser()
    if path.is_dir():
        names = [p.name for p in path.iterdir()]
        if any(name.endswith(TAR_SUFFIXES) for name in names):
            return "shards"
        if any(name.startswith("metadata.") for name in names) or any(
            p.suffix.lower() in IMAGE_SUFFIXES for p in path.rglob("*")
        ):
            return "folder"
        raise UsageError(f"--data {spec} holds neither images nor .tar shards")
    if spec.startswith(REMOTE):
        return "shards"
    if re.match(r"[a-z][a-z0-9+.-]*://", spec):
        raise UsageError(
            f"--data {spec}: unknown scheme; shards come from files, http(s)://, gs://, hf://, or from a command's output, "
            "such as 'pipe:aws s3 cp s3://BUCKET/KEY.tar -'"
        )
    if "*" in spec and not path.exists():
        raise UsageError(
            f"--data {spec}: wildcards are not expanded; name the folder, or use braces, such as shards/{{00..99}}.tar"
        )
    if spec.endswith(TAR_SUFFIXES):
        return "shards"
    if path.exists():
        raise UsageError(f"--data {spec} is neither a folder nor a .tar shard")
    raise UsageError(
        f"--data {spec} does not exist; give a folder of images, .tar shards, tiny, or teacher for no data"
    )


def open_source(spec: str, prompts: str | None, seed: int | None = None) -> Iterator[Member]:
    """The members of one --data argument. Errors of the transport become RunError.

    seed: decides the order of an image folder's members, which is that of their names without one. Shards are read, and
    prompts drawn, in the order they have.
    """
    try:
        yield from SOURCES[kind_of(spec)](spec, prompts, seed)
    except (OSError, EOFError) as error:
        raise RunError(f"--data {spec} cannot be read: {error}") from error


def listed(spec: str, prompts: str | None) -> int | None:
    """How many members a source has, where its listing tells; None for shards, which would have to be read."""
    kind = kind_of(spec)
    if kind == "teacher":
        return len(read_prompts(prompts))
    return len(_folder_entries(Path(spec).expanduser())) if kind == "folder" else None
