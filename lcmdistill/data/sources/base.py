"""What a source is, and what it yields."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lcmdistill.utils.errors import RunError
from lcmdistill.utils.redact import redact_word

if TYPE_CHECKING:
    from lcmdistill.data.trajectories import TrajectoryPlan

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

CAPTION_SUFFIXES = (".txt", ".caption", ".text")
"files that hold the caption of the image of the same name; the first that exists is used"

LARGEST_FILE = 1 << 29
"bytes of an image or caption; a sparse or compressed file may have any size, and would be read into memory"

PART = 128
"members of a part, where a source has no parts of its own"


@dataclass(frozen=True)
class Member:
    """One raw sample, as its source stores it; nothing is decoded or judged yet.

    Attributes:
        key: The name of the sample within its source.
        image: The encoded image, the path of its file, or None where the teacher generates it from the caption.
        caption: The caption, None if there is none.
        meta: Other metadata of the sample, such as `pwatermark`.
        problem: Why the sample cannot be read, where its source already knows.
    """

    key: str
    image: bytes | Path | None
    caption: str | None
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class SourceOptions:
    """Everything besides the --data word that decides what a source holds.

    Attributes:
        prompts: File of prompts for the source `teacher`; None for the default ones.
        own_prompts: The teacher's own default prompts; () for the bundled list.
        seed: Decides the order of an image folder; None keeps the order of the names.
        trajectory: How the source `teacher` generates whole trajectories; None for finished latents only.
    """

    prompts: str | None = None
    own_prompts: tuple[str, ...] = ()
    seed: int | None = None
    trajectory: "TrajectoryPlan | None" = None


@dataclass(frozen=True)
class Source(ABC):
    """A stream of members in an order that never changes, made once from a --data word.

    Attributes:
        word: What the user wrote. It may hold secrets: messages show `label`.
        kind: Its key in SOURCES.
        is_generated: Whether the teacher generates the images, or there are none.
        prompts_only: Whether there are no images, so that nothing but captions is encoded.
        is_remote: Whether reading it takes a network connection or runs a command.
    """

    word: str

    kind: ClassVar[str]
    is_generated: ClassVar[bool] = False
    prompts_only: ClassVar[bool] = False
    is_remote: ClassVar[bool] = False

    @property
    def trajectory(self) -> "TrajectoryPlan | None":
        """How the teacher generates whole trajectories of the members; None where there are only latents."""
        return None

    @property
    def label(self) -> str:
        """The word without secrets, for messages."""
        return redact_word(self.word)

    @classmethod
    @abstractmethod
    def parse(cls, word: str, options: SourceOptions) -> Self | None:
        """Return the source that a --data word names, None if the word is not of this kind.

        Raises:
            UsageError: If the word is of this kind, but what it names does not exist.
        """

    @abstractmethod
    def count(self) -> int | None:
        """Return the number of members, None where only reading all of them would tell."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return plain values that change when the content or the order of the members changes.

        The same content gives the same values however the word is spelled.
        """

    @property
    def num_parts(self) -> int:
        """How many parts the members come in, such as shards: different processes can read different parts."""
        return 1

    @abstractmethod
    def read_part(self, index: int) -> Iterator[Member]:
        """Yield the members of one part; transport errors may be raised as OSError or EOFError."""

    def read(self) -> Iterator[Member]:
        """Yield the members of all parts in their order."""
        for index in range(self.num_parts):
            yield from self.read_part(index)

    def members(self, limit: int | None = None) -> Iterator[Member]:
        """Yield the members, at most `limit` of them.

        Raises:
            RunError: If the source cannot be read to its end.
        """
        yield from self._checked(islice(self.read(), limit))

    def members_of_part(self, index: int, start: int = 0) -> Iterator[Member]:
        """Yield the members of one part, without the first `start` of them.

        Raises:
            RunError: If the part cannot be read to its end.
        """
        yield from self._checked(islice(self.read_part(index), start, None))

    def _checked(self, members: Iterator[Member]) -> Iterator[Member]:
        try:
            yield from members
        except (OSError, EOFError) as error:
            raise RunError(f"--data {self.label} cannot be read: {error}") from error

    def check_reachable(self) -> None:  # noqa: B027 (what is on disk was checked when it was made)
        """Raise UsageError or RunError where the source is missing or cannot be reached."""


def caption_of(values: Mapping[str, Any], *keys: str) -> str | None:
    """Return the caption in the metadata of a sample: the first value of some keys that is text, None if there is none."""
    return next((value for key in keys if isinstance(value := values.get(key), str)), None)


def file_stamp(path: Path, *, with_time: bool = True) -> tuple[int, int]:
    """Return the size and the modification time of a file: what a fingerprint notes of it, (-1, 0) if it is missing."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return -1, 0
    return stat.st_size, stat.st_mtime_ns if with_time else 0
