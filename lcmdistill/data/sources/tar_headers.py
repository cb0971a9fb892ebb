"""Read the headers of a tar archive so that damage neither passes for its end nor is followed without one."""

import tarfile
from collections.abc import Iterator
from typing import Any, Self

ENDS_EARLY = "shard ends early (no end-of-archive mark): the rest is missing"


class ShardEndError(tarfile.ReadError):
    """An archive that does not end as one does. The message is a short reason."""


class Header(tarfile.TarInfo):
    """A member's header, which notes on its archive that the mark of the end was met.

    tarfile itself takes a damaged header and the end of the file for the end of the archive.
    """

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:
        """Return the next header, as tarfile does."""
        try:
            return super().fromtarfile(tarfile)
        except _EndOfArchive:
            tarfile.has_ended = True
            raise


_EndOfArchive: type[Exception] = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]


def headers_of(archive: tarfile.TarFile, *, is_stream: bool = False) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of an archive. tarfile itself follows a damaged size without an end.

    Args:
        archive: The archive, whose files the caller reads between two headers.
        is_stream: Whether it can be read only once.

    Raises:
        tarfile.ReadError: If a size leads backward, or beyond the end of a stream.
    """
    stream: Any = archive.fileobj
    while (header := archive.next()) is not None:
        if header.size < 0:
            raise tarfile.ReadError("a file of negative size")
        yield header
        while is_stream and (left := archive.offset - 1 - stream.tell()) > 0:
            if not stream.read(min(left, 1 << 20)):
                raise ShardEndError(ENDS_EARLY)
