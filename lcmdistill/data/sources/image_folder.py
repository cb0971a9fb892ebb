"""Image folders as a source."""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcmdistill.data.sources.base import IMAGE_SUFFIXES, Member
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.utils.errors import UsageError


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
