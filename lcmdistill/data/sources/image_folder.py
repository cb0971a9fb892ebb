"""Image folders as a source: images with caption files, or with metadata files in the layout of Hugging Face's imagefolder."""

import csv
import io
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from lcmdistill.data.images import IMAGE_SUFFIXES, unsupported_reason
from lcmdistill.data.sources.base import CAPTION_SUFFIXES, Member, Source, SourceOptions, file_stamp
from lcmdistill.data.text import TextEncodingError, decode_text, split_lines
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.utils.errors import UsageError

_METADATA = ("metadata.jsonl", "metadata.csv")
"the first that a folder holds describes all images in it and below it"


@dataclass(frozen=True)
class _Entry:
    """One image of a folder. caption_file: None if there is none; row: of a metadata file, None if there is no such file."""

    name: str
    image: Path
    caption_file: Path | None = None
    row: dict[str, Any] | None = None


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder of images and its sub-folders, linked ones included.

    Images below a folder with a metadata.jsonl or metadata.csv are those of its rows (file_name, and text or caption). All
    other images have a caption file of the same name each.
    """

    root: Path
    seed: int | None
    kind: ClassVar[str] = "folder"

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> Self | None:
        """See `Source.parse`."""
        root = Path(word).expanduser()
        if not root.is_dir():
            return None
        source = cls(word, root, options.seed)
        if not any(_metadata_of(names) or any(map(_is_image, names)) for _, names in source.folders):
            raise UsageError(f"--data {word} holds neither images nor .tar shards")
        return source

    def count(self) -> int:
        """See `Source.count`."""
        return len(self.entries)

    def fingerprint(self) -> dict[str, Any]:
        """Return names, sizes and times of every file that is read, wherever it lies."""
        metadata = [folder / name for folder, names in self.folders if (name := _metadata_of(names))]
        return {
            "metadata": [(str(path.relative_to(self.root)), *file_stamp(path)) for path in metadata],
            "images": [(each.name, *file_stamp(each.image)) for each in self.entries],
            "captions": [file_stamp(each.caption_file) for each in self.entries if each.caption_file],
            "order": self.seed,
        }

    def read(self) -> Iterator[Member]:
        """See `Source.read`."""
        entries = list(self.entries)
        if self.seed is not None:
            # The first n are then a choice from all of the folder, and more of them add to it.
            random.Random(derive_seed(self.seed, "choice")).shuffle(entries)
        for entry in entries:
            yield _member(entry)

    @cached_property
    def folders(self) -> list[tuple[Path, list[str]]]:
        """The root and all folders below it, each with the names of its files."""
        return list(_walk(self.root))

    @cached_property
    def entries(self) -> tuple[_Entry, ...]:
        """The images: rows of metadata files in their order, then the others in the order of their names.

        Raises:
            UsageError: If a metadata file cannot be read.
        """
        described: list[Path] = []
        rows: list[_Entry] = []
        plain: list[_Entry] = []
        in_rows: set[Path] = set()
        for folder, names in self.folders:
            if metadata := _metadata_of(names):
                described.append(folder)
                entries = [_row_entry(row, folder, self.root) for row in _metadata_rows(folder / metadata)]
                rows += [entry for entry in entries if entry.image not in in_rows]
                in_rows |= {entry.image for entry in entries}
            elif not any(folder.is_relative_to(above) for above in described):
                plain += _plain_entries(folder, names, self.root)
        return (*rows, *sorted(plain, key=lambda entry: entry.image))


def _plain_entries(folder: Path, names: list[str], root: Path) -> list[_Entry]:
    """Return the images of a folder without metadata, each with its caption file."""
    by_stem = {(stem, suffix.lower()): stem + suffix for stem, suffix in map(os.path.splitext, names)}
    entries = []
    for name in filter(_is_image, names):
        stem, path = os.path.splitext(name)[0], folder / name
        caption = next((by_stem[stem, end] for end in CAPTION_SUFFIXES if (stem, end) in by_stem), None)
        entries.append(_Entry(str(path.relative_to(root)), path, folder / caption if caption else None))
    return entries


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and all below it, in the order of their names. Each is visited once, so that links cannot loop.

    Linked folders come last: a folder that is also reachable without a link keeps its own name.
    """
    visited: set[Path] = set()
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for start in sorted(waiting):
            for name, folders, files in os.walk(start):
                here = Path(name)
                if here.resolve() in visited:
                    folders.clear()
                    continue
                visited.add(here.resolve())
                folders.sort()
                links += [here / each for each in folders if (here / each).is_symlink()]
                yield here, sorted(files)
        waiting = [link for link in links if link.resolve() not in visited]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _metadata_of(names: list[str]) -> str | None:
    return next((name for name in _METADATA if name in names), None)


def _row_entry(row: dict[str, Any], folder: Path, root: Path) -> _Entry:
    """Return a row's entry; `file_name` is relative to the metadata's folder, and may lead out of it."""
    name = str(row.get("file_name") or "")
    return _Entry(str(folder.relative_to(root) / name) if name else "", folder / name, row=row)


def _member(entry: _Entry) -> Member:
    """Return the member of an image; what cannot be read of it is the member's problem."""
    caption, problem, row = None, None, entry.row or {}
    try:
        if entry.row is not None:
            caption = row.get("text", row.get("caption"))
        elif entry.caption_file is not None:
            caption = decode_text(entry.caption_file.read_bytes())
        if not entry.name or not entry.image.is_file():
            problem = "image file missing"
        elif entry.image.suffix.lower() in IMAGE_SUFFIXES:
            problem = unsupported_reason(entry.image.suffix.lower())
    except TextEncodingError as error:
        problem = f"caption: {error}"
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no file name may
        problem = f"unreadable file ({type(error).__name__})"
    return Member(entry.name, entry.image, caption if isinstance(caption, str) else None, row, problem)


def _metadata_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metadata file.

    Raises:
        UsageError: If it cannot be parsed; the message names file and line.
    """
    try:
        text = decode_text(path.read_bytes())
    except TextEncodingError as error:
        raise UsageError(f"{path}, line {error.line}: {error}; save it as UTF-8") from error
    return _json_rows(path, text) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text)


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(
                f'{path}, line {number}: not a JSON object such as {{"file_name": "a.png", "text": "a cat"}}'
            )
        rows.append(row)
    return rows


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from error
    if "file_name" not in (reader.fieldnames or ()):
        raise UsageError(
            f"{path}, line 1: no column file_name, but {', '.join(reader.fieldnames or ()) or 'nothing'}; "
            "name the columns file_name and text, separated by commas"
        )
    return rows
