"""The command line. Every option is told in plain words; what it means is decided elsewhere, and imported late."""

import gc
import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import typer

from lcmdistill.cli.distill import distill, distill_lora
from lcmdistill.cli.evaluate import evaluate, report
from lcmdistill.cli.export import export
from lcmdistill.cli.info import info
from lcmdistill.cli.sample import sample
from lcmdistill.training.signals import exit_on_sigterm
from lcmdistill.utils.errors import explain
from lcmdistill.utils.logging import configure_console

# The parser's errors are click's, or those of Typer's own copy of click: with the version of Typer.
PARSER_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

SPINS = "3000"
"""how often a thread of the C library's OpenMP looks for another before it sleeps: some 30 microseconds, in which the next
of a network's operations has come. The library's own 3 ms, beside another program, are on the very core that the one it
waits for is to have; and to sleep at once costs more than most operations take"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a Stable Diffusion checkpoint into a student that draws in 1 to 8 steps.",
)
app.command()(distill)
app.command("distill-lora")(distill_lora)
app.command()(sample)
app.command()(evaluate)
app.command()(report)
app.command()(export)
app.command()(info)


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter out of the output; their errors reach the user through ours."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # between two of them


def with_spins(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which threads wait as SPINS says, unless it says already how they wait."""
    return dict(environment) if "OMP_WAIT_POLICY" in environment else {"GOMP_SPINCOUNT": SPINS, **environment}


def main() -> None:
    """The console script: one sentence and an exit code for whatever goes wrong, a traceback only with --debug."""
    _quiet_libraries()
    configure_console()
    os.environ |= with_spins(os.environ)
    # Importing the libraries makes a million objects and no garbage: looking for some is a tenth of a command's start.
    gc.set_threshold(100_000, 50, 50)
    try:
        with exit_on_sigterm():
            code = app(standalone_mode=False)  # what an Exit says; None if a command came to its end
        if code == 130:  # which is how Typer passes Ctrl-C on
            raise KeyboardInterrupt
    except BaseException as error:
        if "--debug" in sys.argv[1:]:
            raise
        code = _show(error) if isinstance(error, PARSER_ERROR) else _tell(*explain(error))
    sys.exit(code or 0)


def _show(error: Any) -> int:
    """What the parser rejects, in one sentence; its several lines of help are for a command without arguments alone."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    said = " ".join(error.format_message().split()).rstrip(".")
    said = said.replace(". Choose", "; choose").replace("Value error, ", "").replace(": Input should", ": it should")
    cause = error.__cause__
    given = cause.errors()[0]["input"] if hasattr(cause, "errors") else None
    got = f", got {given!r}" if given is not None and repr(given) not in said else ""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "lcmdistill"
    return _tell(f"{said[0].lower()}{said[1:]}{got}; see {command} --help", error.exit_code)


def _tell(sentence: str, code: int) -> int:
    """Say what went wrong, once: of several processes that all met it, the first one says it."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # Where the first process fails too, the launcher ends this one meanwhile; an error of this one's own is told.
        time.sleep(5)
        sentence = f"process {rank}: {sentence}"
    if not rank or code < 128:
        print(f"Error: {sentence}" if code < 128 else sentence, file=sys.stderr)  # a signal is no error
    return code
