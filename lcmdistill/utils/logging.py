"""Where messages go: the console, the log file of a run, and progress bars.

Modules log with `logging.getLogger(__name__)`: INFO is for the user, DEBUG for the log file only.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lcmdistill.utils.errors import disk_error
from lcmdistill.utils.redact import RedactingFilter
from lcmdistill.utils.units import duration_text

PACKAGE = "lcmdistill"
LOG_FILE = "log.txt"

clock = time.monotonic

logger = logging.getLogger(__name__)


class ConsoleHandler(logging.Handler):
    """Print the message of each record to the current `sys.stdout`.

    A run must not end because its reader did: once the pipe is closed, the handler drops what follows.
    """

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.addFilter(RedactingFilter())

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; after a closed pipe, do nothing."""
        try:
            print(self.format(record), flush=True)
        except BrokenPipeError:
            discard_output()


def discard_output() -> None:
    """Send standard output to the null device, so that neither this program nor Python's exit writes to a closed pipe."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def configure_console() -> None:
    """Print the package's INFO messages on standard output. An application that added its own handler keeps it."""
    root = logging.getLogger(PACKAGE)
    if not root.handlers:
        handler = ConsoleHandler(logging.INFO)
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False


class _LogFileHandler(logging.FileHandler):
    """A log file that loses records on a full disk, without a traceback: what needs the disk reports it in one sentence."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if error is None or not disk_error(error):
            super().handleError(record)


@contextmanager
def log_file(folder: Path, *, rank: int = 0) -> Iterator[None]:
    """Append the package's messages, DEBUG included, and all Python warnings to `log.txt` in a run folder.

    Warnings go to the file instead of the console. For the main process; a resumed run appends to the same file.
    """
    handler = _LogFileHandler(folder / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    handler.addFilter(RedactingFilter())
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s rank {rank}  %(message)s"))
    root, warnings = logging.getLogger(PACKAGE), logging.getLogger("py.warnings")
    level, propagate = root.level, warnings.propagate
    if any(isinstance(other, ConsoleHandler) for other in root.handlers):  # which has a level of its own
        root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    warnings.addHandler(handler)
    warnings.propagate = False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.propagate = propagate
        warnings.removeHandler(handler)
        root.removeHandler(handler)
        root.setLevel(level)
        with suppress(OSError):
            handler.close()


class Progress:
    """How far a phase of a command is, and how long the command still takes; on a terminal shown as a bar.

    Args:
        total: The units of the phase; None if unknown.
        after: The estimated seconds of what the command does after this phase.
    """

    def __init__(self, total: int | None = None, after: float = 0.0) -> None:
        self.total = total
        self._after = after
        self._show: Callable[[int, str], None] | None = None
        self._seen: deque[tuple[float, float]] = deque([(clock(), 0.0)], maxlen=50)
        self._deadline: float | None = None

    def update(self, done: float, note: str = "", left: float | None = None) -> None:
        """Set how many units are done.

        Args:
            done: Units in all; a fraction of one counts.
            note: A text behind the bar.
            left: Seconds that the command still takes; by default estimated from the units done and what follows.
        """
        now = clock()
        self._seen.append((now, done))
        if left is not None:
            self._deadline = now + left
        if self._show is not None:
            self._show(int(done), note)

    def skip(self, units: float) -> None:
        """Count units that were done before: they say nothing about the speed."""
        self._seen = deque([(when, done + units) for when, done in self._seen], maxlen=self._seen.maxlen)
        self.update(self._seen[-1][1])

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end of the command; None if they cannot be estimated."""
        if self._deadline is not None:
            return max(0.0, self._deadline - clock())
        (began, before), (until, done) = self._seen[0], self._seen[-1]
        if self.total is None or done <= before:
            return None
        rest = (self.total - done) * (until - began) / (done - before)
        return max(0.0, rest - (clock() - until)) + self._after

    @property
    def left_text(self) -> str:
        """The time left in words, or "" if it cannot be estimated."""
        seconds = self.seconds_left
        return "" if seconds is None else f"left {duration_text(seconds)}"

    @property
    def visible(self) -> bool:
        """Whether there is a bar."""
        return self._show is not None


@contextmanager
def progress(title: str, total: int | None, *, enabled: bool = True, after: float = 0.0) -> Iterator[Progress]:
    """Yield a `Progress` for `total` units, with a bar on a terminal.

    Args:
        title: What the units are done for.
        total: The number of units; None shows counts without a share or a time left.
        enabled: Whether to show a bar.
        after: As for `Progress`.
    """
    state = Progress(total, after)
    if not (enabled and sys.stdout is not None and sys.stdout.isatty()):
        yield state
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class LeftColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(state.left_text)

    known = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), LeftColumn())
    columns = ("{task.description}", *(known if total else (SpinnerColumn(), "{task.completed}", TimeElapsedColumn())))
    with RichProgress(*columns, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task(title, total=total, note="")
        state._show = lambda done, note: bar.update(task, completed=done, note=note)
        yield state
