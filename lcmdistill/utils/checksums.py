"""Checksums of files, enough against damage, and fast: they do not protect against intent. Digests of plain values."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

MANIFEST = ".checksums.json"
"the file in a folder with the checksums of the others"

_CHECKSUM = "checksum"

_NOT_LISTED = ("README.md", MANIFEST)
"files that may change: a model card belongs to its author"


def checksum(file: Path) -> str:
    """Return the CRC-32 of a file, in hexadecimal digits."""
    crc = 0
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def checksum_of_text(text: str) -> str:
    """Return the CRC-32 of a text in UTF-8, in hexadecimal digits."""
    return f"{zlib.crc32(text.encode()):08x}"


def digest(value: Any) -> str:
    """Return a short hash of plain values, which names caches and records."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def checked_json(values: Mapping[str, Any]) -> str:
    """Return plain values as JSON with a checksum, for `read_checked_json`."""
    return json.dumps({**values, _CHECKSUM: digest(values)}, indent=1) + "\n"


def read_checked_json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; a file without a checksum, from an earlier version, is not checked.

    Raises:
        ValueError: The file is damaged.
    """
    values = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    expected = values.pop(_CHECKSUM, None)
    if expected is not None and expected != digest(values):
        raise ValueError(f"{path} was changed or damaged after it was written")
    return values


def write_checksums(folder: Path) -> None:
    """Record the checksums of all files in a folder, for `verify_checksums`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _NOT_LISTED)
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def verify_checksums(folder: Path, *, largest: int | None = None) -> None:
    """Check the files of a folder against their recorded checksums; without a record nothing is checked.

    Args:
        folder: The folder.
        largest: Of larger files only the existence is checked, because reading them takes seconds.

    Raises:
        UsageError: A file is missing or changed; the message names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        sums = dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it to use the folder without a check") from error
    for name, expected in sums.items():
        file = folder / name
        is_read = file.is_file() and (largest is None or file.stat().st_size <= largest)
        if not file.is_file() or (is_read and checksum(file) != expected):
            state = "was changed or damaged after the run wrote it" if file.is_file() else "is missing"
            raise UsageError(
                f"{file} {state}; restore it or, for a run, remove {folder} and run its command again (to accept a change, "
                f"remove {path})"
            )
