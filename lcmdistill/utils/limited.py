"""Read a file that a user named, of which nothing is known: it may be a device that never ends."""

import errno
from pathlib import Path


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file or pipe.

    Raises:
        OSError: The file cannot be read, or has more than `limit` bytes.
    """
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise OSError(errno.EINVAL, f"larger than {limit / 2**20:g} MiB", str(path))
    return raw
