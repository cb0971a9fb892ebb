"""Console lines and progress bars."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ConsoleHandler(logging.Handler):
    """Write each record's message to standard output, whatever `sys.stdout` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def configure_console() -> None:
    """Show the package's INFO messages on standard output. An application that added its own handler keeps it."""
    root = logging.getLogger("lcmdistill")
    if not root.handlers:
        root.addHandler(ConsoleHandler())
        root.setLevel(logging.INFO)
        root.propagate = False


class Progress:
    """A bar with speed and time left on a terminal; elsewhere, `say` lines are all there is."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

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
    """A `Progress` for `total` units."""
    if not (enabled and sys.stdout.isatty()):
        yield Progress(None, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, TextColumn("{task.fields[note]}")) as bar:
        yield Progress(bar, bar.add_task(title, total=total, note=""))
