"""Ctrl-C and SIGTERM ask for an end; the program ends where nothing is lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lcmdistill.utils.errors import Interrupted


class Stop:
    """The signal that asked for an end, 0 while none has."""

    signal: int = 0

    def check(self, message: str) -> None:
        """Raise Interrupted if an end was asked for."""
        if self.signal:
            raise Interrupted(message, self.signal)


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """The first signal is noted, for the program to end at a good place; a second one ends it at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number
        if os.environ.get("RANK", "0") == "0":
            # Past Python's own buffers, which a handler may have been called in the middle of.
            os.write(2, b"\nstopping at the next good place, where nothing is lost; once more stops at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, through what tidies up behind it: a SystemExit of 143."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
