"""Webdataset shards as a source: tar archives in which the files of a sample share their name up to the first dot."""

import bz2
import gzip
import io
import logging
import lzma
import math
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from lcmdistill.data.images import IMAGE_SUFFIXES, unsupported_reason
from lcmdistill.data.sources.base import (
    CAPTION_SUFFIXES,
    LARGEST_FILE,
    Member,
    Source,
    SourceOptions,
    caption_of,
    file_stamp,
)
from lcmdistill.data.sources.shard_folders import is_shard, note_others, shards_in
from lcmdistill.data.sources.tar_headers import ENDS_EARLY, Header, ShardEndError, headers_of
from lcmdistill.data.text import TextEncodingError, decode_text
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.redact import redact_word

logger = logging.getLogger(__name__)

_META = re.compile(r"__[^/]*__($|/)")
"names of files about the shard itself, which webdataset reserves"

_DECOMPRESSORS: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"first bytes of compressed archives; tarfile's own decompression does not compare gzip's checksum"

MOST_SHARDS = 1_000_000

_KNOWN = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, ".json")

Files = dict[str, Callable[[], bytes]]
"the files of a sample: {suffix: function that reads it}"


@dataclass(frozen=True)
class Shards(Source):
    """Tar archives on disk: a folder of them, a file, or brace patterns, several joined by "::"."""

    urls: tuple[str, ...]
    kind: ClassVar[str] = "shards"

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> Self | None:
        """See `Source.parse`."""
        folder = Path(word).expanduser()
        if folder.is_dir():
            urls = shards_in(folder)
            for url in urls:
                check_file(word, url)
            if urls:
                note_others(folder)
            return cls(word, urls) if urls else None
        if not is_shard(word) or ("*" in word and not folder.exists()):
            return None
        urls = expand(word)
        for url in urls:
            check_file(word, url)
        return cls(word, urls)

    def count(self) -> int | None:
        """See `Source.count`."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {"files": [(Path(url).name, *file_stamp(Path(url))) for url in self.urls]}

    @property
    def num_parts(self) -> int:
        """The number of shards."""
        return len(self.urls)

    def read_part(self, index: int) -> Iterator[Member]:
        """Yield the members of a shard."""
        return read_shard_file(Path(self.urls[index]))


@cache
def _note_scattered(path: Path) -> None:
    """Log once what a shard's order is good for, and what not."""
    logger.info(
        f"{path}: the files of a sample are not side by side; they were joined by their names (other programs need such a "
        "shard sorted: tar --sort=name)"
    )


def expand(word: str) -> tuple[str, ...]:
    """Return the shards that a brace pattern names, in order.

    Raises:
        UsageError: There are more than MOST_SHARDS.
    """
    from webdataset.shardlists import expand_urls

    count = math.prod(
        abs(int(last) - int(first)) + 1 for first, last in re.findall(r"{(\d{1,18})\.\.(\d{1,18})}", word)
    )
    if count > MOST_SHARDS:
        raise UsageError(f"--data {redact_word(word)} names {count:,} shards; at most {MOST_SHARDS:,} are read")
    return tuple(url if "://" in url else str(Path(url).expanduser()) for url in expand_urls(word))


def check_file(word: str, url: str) -> None:
    """Raise UsageError unless a shard is a file. A command is run only where it is the whole word, and can be seen."""
    if not Path(url).is_file():
        raise UsageError(f"--data {redact_word(word)}: there is no shard {redact_word(url)}")


def read_shard_file(path: Path) -> Iterator[Member]:
    """Yield the members of a shard on disk; whatever cannot be read of it is yielded as a member with a problem."""
    with path.open("rb") as stream:
        decompress = _decompressor(stream.read(6))
        stream.seek(0)
        problems: list[str] = []
        samples = _streamed(decompress(stream), problems) if decompress else _indexed(stream, problems, path)
        try:
            for sample in samples:
                yield from _drain(problems)
                yield from _sample_members(*sample)
        except Exception as error:
            problems.append(_unreadable(error))
        yield from _drain(problems)


def read_shard_stream(stream: io.BufferedIOBase) -> Iterator[Member]:
    """Yield the members of a shard that arrives as a stream.

    Raises:
        Exception: Whatever the transport or the archive's reader raises.
        tarfile.ReadError: If the archive ends early.
    """
    problems: list[str] = []
    start = stream.read(6)
    decompress, whole = _decompressor(start), io.BufferedReader(_Rejoined(start, stream))
    for sample in _streamed(decompress(whole) if decompress else whole, problems, strict=True):
        yield from _drain(problems)
        yield from _sample_members(*sample)
    yield from _drain(problems)


def _decompressor(start: bytes) -> Callable[[Any], Any] | None:
    return next((each for signature, each in _DECOMPRESSORS.items() if start.startswith(signature)), None)


class _Rejoined(io.RawIOBase):
    """A stream of which the first bytes were read already."""

    def __init__(self, start: bytes, stream: io.BufferedIOBase) -> None:
        self._start, self._stream = start, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start[: len(buffer)] or self._stream.read1(len(buffer))
        self._start = self._start[len(data) :]
        buffer[: len(data)] = data
        return len(data)


NOT_ADJACENT = "files of a sample are not side by side in a compressed or remote shard; sort it with tar --sort=name"

NOT_A_FILE = "link or device in a shard: not read (pack files with tar --hard-dereference --dereference)"

TOO_LARGE = "file of more than 512 MiB in a shard: not read"

NAMED_TWICE = "file named twice in a shard"

NOT_THE_END = (
    "data after the end-of-archive mark of a shard (a damaged part, or several archives in one file): not read"
)

NO_FILES = "shard without files"

MANY_ZEROS = "shard ends in zeros: the rest may be missing (an incomplete download)"

BAD_CHECKSUM = "checksum of a compressed shard does not match: any sample of it may be damaged"


def _samples_files(
    headers: Iterator[tarfile.TarInfo], problems: list[str]
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, rest of the name, header) of the files that belong to samples; others that look so are problems."""
    for header in headers:
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", header.name, re.DOTALL)
        if not match or _META.match(header.name) or header.isdir():
            continue
        if not header.isreg():
            problems.append(NOT_A_FILE)
        elif header.size > LARGEST_FILE:
            problems.append(TOO_LARGE)
        else:
            yield match[1], match[2].lower(), header


def _indexed(stream: Any, problems: list[str], path: Path) -> Iterator[tuple[str, Files]]:
    """Yield the samples of an uncompressed shard, their files joined wherever they stand in it."""
    samples: dict[str, Files] = {}
    last, is_scattered = None, False
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=Header) as archive:
        try:
            for key, rest, header in _samples_files(headers_of(archive), problems):
                is_scattered = is_scattered or (key in samples and key != last)
                files, last = samples.setdefault(key, {}), key
                if rest in files:
                    problems.append(NAMED_TWICE)
                else:
                    files[rest] = lambda header=header: _content(archive, header)
            stream.seek(archive.offset)
            _check_end(archive, stream, problems)
        except Exception as error:  # what stands before the damage is used
            problems.append(_unreadable(error))
        if is_scattered:
            _note_scattered(path)
        at_end, problems[:] = list(problems), []
        yield from samples.items()
        problems += at_end


def _streamed(stream: Any, problems: list[str], *, strict: bool = False) -> Iterator[tuple[str, Files]]:
    """Yield the samples of a shard that can be read only once.

    strict: raise tarfile.ReadError for an archive that ends early, rather than note it as a problem.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header) as archive:
        done: set[str] = set()
        current, files = "", {}
        try:
            for key, rest, header in _samples_files(headers_of(archive, is_stream=True), problems):
                if key != current:
                    if files:
                        yield current, files
                        done.add(current)
                    current, files = key, {}
                    if key in done:
                        problems.append(NOT_ADJACENT)
                if rest in files:
                    problems.append(NAMED_TWICE)
                elif key not in done:
                    content = _content(archive, header)
                    files[rest] = lambda content=content: content
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue] (tarfile keeps all headers otherwise)
            _check_end(archive, archive.fileobj, problems)
        except Exception as error:  # what stands before the damage is used
            if strict:
                raise
            problems.append(_unreadable(error))
        if files:
            yield current, files


def _check_end(archive: tarfile.TarFile, rest: Any, problems: list[str]) -> None:
    """Check that an archive has ended with its mark, and that only a few zeros follow. All of `rest` is read.

    Args:
        archive: The archive, whose headers were read.
        rest: The stream behind the mark.
        problems: What is odd, but may be meant, is added to it.

    Raises:
        ShardEndError: If the mark is missing, or data follow it.
        Exception: Whatever the decompression of the rest raises, such as for a checksum that does not match.
    """
    if not getattr(archive, "has_ended", False):
        raise ShardEndError(ENDS_EARLY)
    has_data, size = False, 0
    while block := rest.read(1 << 20):
        has_data, size = has_data or block.count(0) != len(block), size + len(block)
    if has_data:
        raise ShardEndError(NOT_THE_END)
    if archive.offset == 0:
        problems.append(NO_FILES)
    elif size > tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE:
        problems.append(MANY_ZEROS)


def _unreadable(error: Exception) -> str:
    if isinstance(error, ShardEndError):
        return str(error)
    if isinstance(error, EOFError) or "unexpected end of data" in str(error):
        return ENDS_EARLY
    if isinstance(error, gzip.BadGzipFile) and "CRC" in str(error):
        return BAD_CHECKSUM
    return f"unreadable part of a shard ({type(error).__name__})"


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(header)
    assert file is not None
    return file.read()


def _drain(problems: list[str]) -> Iterator[Member]:
    while problems:
        yield Member("", None, None, problem=problems.pop(0))


def _sample_members(key: str, files: Files) -> Iterator[Member]:
    """Yield the samples among the files that share a name up to its first dot: one, unless names hold dots.

    "0001.jpg", "0001.txt" and "0001.seg.png" are one sample with an image that is not used. "1.5 apples.png" and
    "1.5 apples.txt" are one sample, whose name has a dot.
    """
    by_stem: dict[str, Files] = {}
    for rest, read in files.items():
        stem, _, suffix = rest.rpartition(".")
        by_stem.setdefault(stem, {})[f".{suffix}"] = read
    plain = by_stem.pop("", None)
    if plain is not None and any(suffix in _KNOWN for suffix in plain):
        yield _member(key, plain)
        by_stem = {stem: each for stem, each in by_stem.items() if _image_suffix(each) and _caption_suffix(each)}
    elif plain is not None and not by_stem:
        yield _member(key, plain)
    for stem, each in by_stem.items():
        yield _member(f"{key}.{stem}", each)


def _image_suffix(files: Mapping[str, Any]) -> str | None:
    return next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), None)


def _caption_suffix(files: Mapping[str, Any]) -> str | None:
    return next((suffix for suffix in CAPTION_SUFFIXES if suffix in files), None)


def _member(key: str, files: Files) -> Member:
    """Return the member of a sample's files; whatever goes wrong with them is the member's problem."""
    try:
        image_suffix, caption_suffix = _image_suffix(files), _caption_suffix(files)
        if image_suffix is None:
            return Member(key, None, None, problem="no image")
        if reason := unsupported_reason(image_suffix):
            return Member(key, None, None, problem=reason)
        meta = _json(files[".json"]()) if ".json" in files else {}
        if caption_suffix:
            caption = decode_text(files[caption_suffix]())
        elif meta is None:
            return Member(key, None, None, problem="unreadable JSON")
        else:
            caption = caption_of(meta, "caption", "text")
        return Member(key, files[image_suffix](), caption, meta or {})
    except TextEncodingError as error:
        return Member(key, None, None, problem=f"caption: {error}")
    except Exception as error:
        return Member(key, None, None, problem=_unreadable(error))


def _json(raw: bytes) -> dict[str, Any] | None:
    """Return a sample's metadata, None if they cannot be parsed, {} if they are not an object."""
    try:
        loaded = parse_json(decode_text(raw))
    except ValueError:
        return None
    return loaded if isinstance(loaded, dict) else {}
