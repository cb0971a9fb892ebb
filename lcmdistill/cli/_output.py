"""What several commands print and ask: tables, and the question before something is deleted."""

import sys
from collections.abc import Sequence

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.redact import printable


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, each column as wide as its widest cell."""
    rows = [[printable(cell, lines=False) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def confirm(question: str, *, yes: bool) -> bool:
    """Ask before something is deleted, and return the answer; without a terminal, --yes is the answer.

    Raises:
        UsageError: There is no terminal to ask on, and no --yes.
    """
    if yes:
        return True
    if not (sys.stdin is not None and sys.stdin.isatty()):
        raise UsageError(f"{question} There is no terminal to ask on; add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
