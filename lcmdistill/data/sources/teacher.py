"""Prompts as a source: the teacher generates the images."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lcmdistill.data.sources.base import LARGEST_FILE, PART, Member, Source, SourceOptions
from lcmdistill.data.text import TextEncodingError, decode_text, split_lines
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.limited import read_limited

if TYPE_CHECKING:
    from lcmdistill.data.trajectories import TrajectoryPlan


@dataclass(frozen=True)
class TeacherSource(Source):
    """No data set: one member per prompt, and the teacher generates the latents."""

    options: SourceOptions
    kind: ClassVar[str] = "teacher"
    is_generated: ClassVar[bool] = True

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> Self | None:
        """See `Source.parse`."""
        return cls(word, options) if word == cls.kind else None

    @property
    def trajectory(self) -> "TrajectoryPlan | None":
        """See `Source.trajectory`."""
        return self.options.trajectory

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts: those of the file, the teacher's own, or the bundled list."""
        of_teacher = self.options.own_prompts if self.options.prompts is None else ()
        return tuple(of_teacher or read_prompts(self.options.prompts))

    def count(self) -> int:
        """See `Source.count`."""
        return len(self.prompts)

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {"prompts": hashlib.blake2b("\n".join(self.prompts).encode(), digest_size=16).hexdigest()}

    @property
    def num_parts(self) -> int:
        """See `Source.num_parts`."""
        return -(-len(self.prompts) // PART)

    def read_part(self, index: int) -> Iterator[Member]:
        """See `Source.read_part`."""
        for i in range(index * PART, min((index + 1) * PART, len(self.prompts))):
            yield Member(str(i), None, self.prompts[i])

    def members(self, limit: int | None = None) -> Iterator[Member]:
        """Yield the members; they repeat if `limit` asks for more of them than there are prompts."""
        members = super().members()
        return members if limit is None else itertools.islice(itertools.cycle(members), limit)


def read_prompts(path: str | None) -> list[str]:
    """Return the prompts of a file, one per line without blank lines; None reads the bundled list.

    Raises:
        UsageError: If the file is missing, empty, too large or not text.
    """
    source = Path(path).expanduser() if path else Path(str(files("lcmdistill") / "assets" / "prompts.txt"))
    try:
        lines = [line.strip() for line in split_lines(decode_text(read_limited(source, LARGEST_FILE)))]
    except (OSError, TextEncodingError) as error:
        where = f", line {error.line}" if isinstance(error, TextEncodingError) else ""
        raise UsageError(
            f"--prompts {path}{where} cannot be read ({error}); pass a UTF-8 text file with one prompt per line"
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UsageError(f"--prompts {path} has no prompts; pass a text file with one prompt per line")
    return prompts
