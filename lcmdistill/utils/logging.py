"""Where messages go: the console, the log file of a run, and progress bars.

Modules log with `logging.getLogger(__name__)`: INFO is for the user, DEBUG for the log file only.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lcmdistill.utils.errors import disk_error
from lcmdistill.utils.redact import RedactingFilter

PACKAGE = "lcmdistill"
LOG_FILE = "log.txt"

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
    """A bar with speed and time left on a terminal; elsewhere it shows nothing."""

    def __init__(self, bar: Any, task: Any, total: int | None = None) -> None:
        self._bar, self._task, self.total = bar, task, total

    def update(self, done: int, note: str = "") -> None:
        """Set how many units are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)

    @property
    def visible(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None


@contextmanager
def progress(title: str, total: int | None, *, enabled: bool = True) -> Iterator[Progress]:
    """Yield a `Progress` for `total` units; without a known total it shows counts and no share or time left."""
    if not (enabled and sys.stdout is not None and sys.stdout.isatty()):
        yield Progress(None, None, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    known = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    columns = ("{task.description}", *(known if total else (SpinnerColumn(), "{task.completed}", TimeElapsedColumn())))
    with RichProgress(*columns, TextColumn("{task.fields[note]}")) as bar:
        yield Progress(bar, bar.add_task(title, total=total, note=""), total)
