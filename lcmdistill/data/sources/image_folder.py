"""Image folders as a source: images with caption files, or with metadata files in the layout of Hugging Face's imagefolder."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from lcmdistill.data.images import IMAGE_SUFFIXES, unsupported_reason
from lcmdistill.data.sources.base import (
    CAPTION_SUFFIXES,
    LARGEST_FILE,
    PART,
    Member,
    Source,
    SourceOptions,
    caption_of,
    file_stamp,
)
from lcmdistill.data.sources.metadata_files import metadata_rows
from lcmdistill.data.text import TextEncodingError, decode_text
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.utils.errors import UsageError

TOO_LARGE = "file of more than 512 MiB: not read"

_RUN = ".data.json"
"a file in the folder of every run"

_METADATA = ("metadata.jsonl", "metadata.csv")
"the first that a folder holds, in small letters or capitals, describes all images in it and below it"


@dataclass(frozen=True)
class _Entry:
    """One image of a folder.

    Attributes:
        name: Its path below the root.
        image: Its file; the metadata file where the row is damaged.
        caption_file: None if there is none.
        row: Of a metadata file; None if there is no such file.
        problem: Why it cannot be used, where that is known already.
    """

    name: str
    image: Path
    caption_file: Path | None = None
    row: dict[str, Any] | None = None
    problem: str | None = None


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
        return len(self.entries) + len(self.left_over)

    def fingerprint(self) -> dict[str, Any]:
        """Return names, sizes and times of every file that is read, wherever it lies."""
        metadata = [folder / name for folder, names in self.folders if (name := _metadata_of(names))]
        return {
            "metadata": [(str(path.relative_to(self.root)), *file_stamp(path)) for path in metadata],
            "images": [(each.name, *file_stamp(each.image)) for each in self.entries],
            # A place for each image: a caption file that gets the name of another image is another caption.
            "captions": [
                each.caption_file and file_stamp(each.caption_file) for each in self.entries if each.row is None
            ],
            "order": self.seed,
        }

    @property
    def num_parts(self) -> int:
        """See `Source.num_parts`."""
        return -(-self.count() // PART)

    def read_part(self, index: int) -> Iterator[Member]:
        """See `Source.read_part`."""
        ordered, first = self._ordered, index * PART
        for place in range(first, min(first + PART, self.count())):
            if place < len(ordered):
                yield _member(ordered[place])
            else:
                name, problem = self.left_over[place - len(ordered)]
                yield Member(name, None, None, problem=problem)

    @cached_property
    def _ordered(self) -> list[_Entry]:
        """The images in the order in which they are read."""
        entries = list(self.entries)
        if self.seed is not None:
            # The first n are then a choice from all of the folder, and more of them add to it.
            random.Random(derive_seed(self.seed, "choice")).shuffle(entries)
        return entries

    @cached_property
    def folders(self) -> list[tuple[Path, list[str]]]:
        """The root and all folders below it that can be read, each with the names of its files."""
        return [(folder, names) for folder, names in self._walked if names is not None]

    @cached_property
    def _walked(self) -> list[tuple[Path, list[str] | None]]:
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
        in_rows: set[str] = set()
        for folder, names in self.folders:
            if metadata := _metadata_of(names):
                described.append(folder)
                entries = [
                    _row_entry(row, problem, folder / metadata, self.root)
                    for row, problem in metadata_rows(
                        folder / metadata, str((folder / metadata).relative_to(self.root))
                    )
                ]
                rows += [entry for entry in entries if os.path.normpath(entry.image) not in in_rows]
                in_rows |= {os.path.normpath(entry.image) for entry in entries}
            elif not any(folder.is_relative_to(above) for above in described):
                plain += _plain_entries(folder, names, self.root)
        return (*rows, *sorted(plain, key=lambda entry: entry.image))

    @cached_property
    def left_over(self) -> list[tuple[str, str]]:
        """(name, reason) of what is not used: images that no metadata file names, captions without an image, closed folders.

        Of the images as many are left out as there are damaged rows, which are counted themselves.
        """
        used = {os.path.normpath(entry.image) for entry in self.entries}
        captioned = {os.path.splitext(entry.image)[0] for entry in self.entries}
        described = [folder for folder, names in self.folders if _metadata_of(names)]
        images: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        for folder, names in self._walked:
            if names is None:
                others.append((str(folder.relative_to(self.root)), "unreadable folder"))
            has_metadata = any(folder.is_relative_to(above) for above in described)
            for path in (folder / name for name in names or ()):
                name, (stem, suffix) = str(path.relative_to(self.root)), os.path.splitext(path)
                if _is_image(path.name) and os.path.normpath(path) not in used:
                    images.append((name, "image without a row in the metadata file"))
                elif not has_metadata and suffix.lower() in CAPTION_SUFFIXES and stem not in captioned:
                    others.append((name, "no image"))
        return images[sum(entry.problem is not None for entry in self.entries) :] + others


def _plain_entries(folder: Path, names: list[str], root: Path) -> list[_Entry]:
    """Return the images of a folder without metadata, each with its caption file."""
    by_stem = {(stem, suffix.lower()): stem + suffix for stem, suffix in map(os.path.splitext, names)}
    entries = []
    for name in filter(_is_image, names):
        stem, path = os.path.splitext(name)[0], folder / name
        caption = next((by_stem[stem, end] for end in CAPTION_SUFFIXES if (stem, end) in by_stem), None)
        entries.append(_Entry(str(path.relative_to(root)), path, folder / caption if caption else None))
    return entries


def _walk(root: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """Yield a folder and all below it, in the order of their names. Each is visited once, so that links cannot loop.

    Linked folders come last: a folder that is also reachable without a link keeps its own name. The names of the files are
    None for a folder that cannot be read. Folders of runs are left out: their own pictures would change the data.
    """
    visited: set[Path] = set()
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for start in sorted(waiting):
            closed: list[OSError] = []
            for name, folders, files in os.walk(start, onerror=closed.append):
                here = Path(name)
                if here.resolve() in visited:
                    folders.clear()
                    continue
                visited.add(here.resolve())
                folders[:] = sorted(each for each in folders if not (here / each / _RUN).is_file())
                links += [here / each for each in folders if (here / each).is_symlink()]
                yield here, sorted(files)
            yield from ((Path(error.filename), None) for error in closed)
        waiting = [link for link in links if link.resolve() not in visited]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _metadata_of(names: list[str]) -> str | None:
    return next((name for wanted in _METADATA for name in names if name.lower() == wanted), None)


def _row_entry(row: dict[str, Any], problem: str | None, metadata: Path, root: Path) -> _Entry:
    """Return a row's entry; `file_name` is relative to the metadata's folder, and may lead out of it."""
    folder, name = metadata.parent, str(row.get("file_name") or "")
    if problem:
        return _Entry(problem, metadata, row=row, problem=problem)
    return _Entry(str(folder.relative_to(root) / name) if name else "", folder / name, row=row)


def _member(entry: _Entry) -> Member:
    """Return the member of an image; what cannot be read of it is the member's problem."""
    caption, problem, row = None, entry.problem, entry.row or {}
    try:
        if entry.row is not None:
            caption = caption_of(row, "text", "caption")
        elif entry.caption_file is not None and not entry.caption_file.is_file():
            problem = "caption is not a file"  # a pipe or a device, whose reading might not end
        elif entry.caption_file is not None and entry.caption_file.stat().st_size > LARGEST_FILE:
            problem = TOO_LARGE
        elif entry.caption_file is not None:
            caption = decode_text(entry.caption_file.read_bytes())
        if problem:
            pass
        elif not entry.name or not entry.image.is_file():
            problem = "image file missing"
        elif entry.image.stat().st_size > LARGEST_FILE:
            problem = TOO_LARGE
        elif entry.image.suffix.lower() in IMAGE_SUFFIXES:
            problem = unsupported_reason(entry.image.suffix.lower())
    except TextEncodingError as error:
        problem = f"caption: {error}"
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no file name may
        problem = f"unreadable file ({type(error).__name__})"
    return Member(entry.name, entry.image, caption, row, problem)
