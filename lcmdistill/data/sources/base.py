"""What every source yields."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
