"""Ctrl-C and SIGTERM request a stop; the program stops where nothing is lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lcmdistill.utils.errors import Interrupted
from lcmdistill.utils.launch import process_index


class Stop:
    """The signal that requested a stop, and how the program answers it.

    Attributes:
        signal: The signal; 0 until there is one.
        is_immediate: Whether the first signal stops the program at once: where nothing is lost by it.
        message: What the program then reports.
    """

    signal: int = 0
    is_immediate: bool = False
    message: str = ""

    def check(self, message: str) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.signal:
            raise Interrupted(message, self.signal)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Let a signal in this block stop the program at once, with a message."""
        self.check(message)
        before = self.is_immediate, self.message
        self.is_immediate, self.message = True, message
        try:
            yield
        finally:
            self.is_immediate, self.message = before


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Record the first signal, for the program to stop at a safe point: at once, or after the training step.

    A second one stops it immediately.
    """
    stop = Stop()

    def request(number: int, frame: Any) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number
        if stop.is_immediate:
            raise Interrupted(stop.message, number)
        if process_index() == 0:
            # Not through Python's buffers, which the handler may have interrupted.
            os.write(2, b"\nstopping at the next safe point; press Ctrl-C again to stop immediately\n")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, with all cleanup: by a SystemExit of 143."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_sigterm() -> None:
    """Ignore SIGTERM to the end of `exit_on_sigterm`: a launcher that ends all processes must not cut off a last sentence."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
