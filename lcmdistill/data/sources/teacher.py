"""Prompts as a source: the teacher generates the latents."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from lcmdistill.data.sources.base import Member
from lcmdistill.utils.errors import UsageError


def teacher(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """No data set: prompts only, one member each; the teacher draws the latents."""
    for i, prompt in enumerate(read_prompts(prompts)):
        yield Member(str(i), None, prompt)


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a file, one a line, blank lines skipped; None reads the bundled list.

    Raises UsageError if the file is absent or empty.
    """
    source = Path(path).expanduser() if path else Path(str(files("lcmdistill") / "assets" / "prompts.txt"))
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read ({error}); give a text file, one prompt a line") from error
    found = [line for line in lines if line]
    if not found:
        raise UsageError(f"--prompts {path} holds no prompt; give one a line")
    return found
