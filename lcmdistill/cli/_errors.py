"""Report whatever ends a command: one sentence on stderr and an exit code."""

import re
import sys
import time
from typing import Any

import typer

from lcmdistill.utils.errors import explain
from lcmdistill.utils.launch import process_index
from lcmdistill.utils.logging import discard_output
from lcmdistill.utils.redact import printable, redact_text
from lcmdistill.utils.spelling import near_words

# The parser's errors are click's, or those of Typer's own copy of click: it depends on the version of Typer.
PARSER_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def report_error(error: BaseException) -> int:
    """Print what ended a command and return its exit code."""
    if isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
        discard_output()
        return 128 + 13  # as SIGPIPE ends a program, without a message: the reader, such as `head`, has closed the pipe
    if isinstance(error, PARSER_ERROR):
        return _report_parser_error(error)
    return _print_once(*explain(error))


def parser_sentence(error: Any) -> str:
    """Return a parser's error as one sentence with the value that it got."""
    text = " ".join(error.format_message().split()).rstrip(".")
    text = text.replace(". Choose", "; choose").replace("Value error, ", "").replace(": Input should", ": it should")
    text = re.sub(r"valid integer(, unable to parse string as an integer)?", "whole number", text)
    text = re.sub(r"valid number(, unable to parse string as a number)?", "number", text)
    text = re.sub(r"\.? (Did you mean|\(Possible options:).*", "", text)  # by a spelling that is too lenient
    if chosen := re.search(r"'([^']*)' is not one of (.+)", text):
        near = near_words(chosen[1], re.findall(r"'([^']*)'", chosen[2]))
        text += f" (did you mean {near[0]!r}?)" if near else ""
    cause = error.__cause__
    value = cause.errors()[0]["input"] if hasattr(cause, "errors") else None
    got = f", got {value!r}" if value is not None and repr(value) not in text else ""
    return f"{text[0].lower()}{text[1:]}{got}"


def _report_parser_error(error: Any) -> int:
    """Print a parser's error as one sentence; a command without any arguments shows its help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "lcmdistill"
    return _print_once(f"{parser_sentence(error)}; see {path} --help", error.exit_code)


def _print_once(sentence: str, code: int) -> int:
    """Print a sentence and return the exit code. Of several processes that fail alike, only the first one prints it."""
    rank = process_index()
    if rank:
        # If the first process fails as well, the launcher ends this one meanwhile; an error of this process only is printed.
        time.sleep(5)
        sentence = f"process {rank}: {sentence}"
    sentence = printable(redact_text(sentence), lines=False)
    if not rank or code < 128:
        print(f"Error: {sentence}" if code < 128 else sentence, file=sys.stderr)  # a signal is not an error
    return code
