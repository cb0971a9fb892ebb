"""The captions of another source, for methods that learn from prompts alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from lcmdistill.data.sources.base import Member, Source, SourceOptions


@dataclass(frozen=True)
class Captions(Source):
    """A source without its images: nothing is generated, and only captions are encoded. No --data word names it."""

    source: Source
    kind: ClassVar[str] = "captions"
    is_generated: ClassVar[bool] = True
    prompts_only: ClassVar[bool] = True

    @classmethod
    def of(cls, source: Source) -> Self:
        """Return the captions of a source."""
        return cls(source.word, source)

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> None:
        """See `Source.parse`."""

    def count(self) -> int | None:
        """See `Source.count`."""
        return self.source.count()

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {"captions of": self.source.kind, **self.source.fingerprint()}

    @property
    def num_parts(self) -> int:
        """See `Source.num_parts`."""
        return self.source.num_parts

    def read_part(self, index: int) -> Iterator[Member]:
        """See `Source.read_part`."""
        return map(_without_image, self.source.read_part(index))

    def members(self, limit: int | None = None) -> Iterator[Member]:
        """Yield the members, as many as the source would."""
        return map(_without_image, self.source.members(limit))

    def check_reachable(self) -> None:
        """See `Source.check_reachable`."""
        self.source.check_reachable()


def _without_image(member: Member) -> Member:
    return replace(member, image=None)
