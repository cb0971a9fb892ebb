"""The hub's connections: a server that accepts a request and never answers must not hold a program forever."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 15
"how long a request that has no limit of its own waits for each part of an answer"


class HubStalled(ConnectionError):
    """The hub did not answer in time."""


@contextmanager
def limited_waiting(seconds: float = SECONDS) -> Iterator[None]:
    """Limit the waiting of huggingface_hub's requests in this thread in a `with` block, and do not repeat them.

    Downloads of files have a limit of their own, and are repeated.

    Args:
        seconds: The limit for each of connecting, sending and receiving.

    Raises:
        HubStalled: A request, other than the download of a file, had no answer in time.
    """
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    send = session.send

    def limited(request: Any, **options: Any) -> Any:
        if hasattr(request, "extensions"):  # httpx, since huggingface_hub 1.0
            waits = request.extensions.get("timeout") or {}
            every = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
            request.extensions |= {} if any(waits.values()) else {"timeout": every}
        elif options.get("timeout") is None:
            options["timeout"] = seconds
        try:
            return send(request, **options)
        except Exception as error:
            if "Timeout" in type(error).__name__ and not options.get("stream"):
                raise HubStalled(f"the hub did not answer within {seconds:g} s") from None
            raise

    session.send = limited
    try:
        yield
    finally:
        del session.send


def is_caused_by(error: BaseException | None, name: str) -> bool:
    """Return whether an error of a class is among the causes of another, or is it."""
    return error is not None and (type(error).__name__ == name or is_caused_by(error.__context__, name))
