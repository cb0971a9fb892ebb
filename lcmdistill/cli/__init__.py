"""The command line. Every option is told in plain words; what it means is decided elsewhere, and imported late."""

import difflib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Annotated, Any

import typer

from lcmdistill import __version__
from lcmdistill.cli.distill import distill, distill_lora
from lcmdistill.cli.evaluate import evaluate, report
from lcmdistill.cli.export import export
from lcmdistill.cli.info import info
from lcmdistill.cli.sample import sample
from lcmdistill.training.signals import exit_on_sigterm
from lcmdistill.utils.errors import UsageError, explain
from lcmdistill.utils.logging import configure_console, discard_output
from lcmdistill.utils.runtime import configure_process

# The parser's errors are click's, or those of Typer's own copy of click: with the version of Typer.
PARSER_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distill a Stable Diffusion checkpoint into a student that generates images in 1 to 8 steps.",
)


def _show_version(requested: bool) -> None:
    if requested:
        print(f"lcmdistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Distill a Stable Diffusion checkpoint into a student that generates images in 1 to 8 steps."""


app.command()(distill)
app.command("distill-lora")(distill_lora)
app.command()(sample)
app.command()(evaluate)
app.command()(report)
app.command()(export)
app.command()(info)


def main() -> None:
    """The console script: one sentence and an exit code for whatever goes wrong, a traceback only with --debug."""
    configure_process()
    configure_console()
    try:
        with exit_on_sigterm():
            result = app(standalone_mode=False)  # an exit code, or what the command returned to `call`
        code = result if isinstance(result, int) else 0
        if code == 130:  # which is how Typer passes Ctrl-C on
            raise KeyboardInterrupt
    except BaseException as error:
        if "--debug" in sys.argv[1:]:
            raise
        if isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
            discard_output()
            code = (
                128 + 13
            )  # as SIGPIPE ends a program, without a word: the reader, such as `head`, has closed the pipe
        else:
            code = _show(error) if isinstance(error, PARSER_ERROR) else _tell(*explain(error))
    sys.exit(code or 0)


def _show(error: Any) -> int:
    """What the parser rejects, in one sentence; its several lines of help are for a command without arguments alone."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    context = getattr(error, "ctx", None)
    return _tell(f"{_sentence(error)}; see {context.command_path if context else 'lcmdistill'} --help", error.exit_code)


def _sentence(error: Any) -> str:
    """Return a parser's error as one sentence with the value that it got."""
    said = " ".join(error.format_message().split()).rstrip(".")
    said = said.replace(". Choose", "; choose").replace("Value error, ", "").replace(": Input should", ": it should")
    cause = error.__cause__
    given = cause.errors()[0]["input"] if hasattr(cause, "errors") else None
    got = f", got {given!r}" if given is not None and repr(given) not in said else ""
    return f"{said[0].lower()}{said[1:]}{got}"


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


def call(name: str, options: Mapping[str, Any]) -> Any:
    """Call a command as a function, with the checks and defaults of its command line.

    Args:
        name: The command, such as "distill-lora".
        options: The value of each option or argument, by its name with underscores. None is the default; a sequence
            repeats the option.

    Returns:
        What the command returns.

    Raises:
        UsageError: An option is unknown, or has a value that is not allowed.
    """
    command: Any = typer.main.get_command(app)
    parameters = {_public_name(parameter): parameter for parameter in command.commands[name].params}
    words, positional = [name], []
    for key, value in options.items():
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"see lcmdistill {name} --help"
            raise UsageError(f"unknown option {key!r} of {name}; {hint}")
        parameter = parameters[key]
        values = [] if value is None else [value] if isinstance(value, str | PathLike | bool) else value
        values = values if isinstance(values, Iterable) else [values]
        if parameter.param_type_name == "argument":
            positional += map(str, values)
        elif getattr(parameter, "is_flag", False):
            words += (parameter.opts if value else parameter.secondary_opts)[:1]
        else:
            words += [f"{parameter.opts[0]}={each}" for each in values]
    try:
        result = command.main(args=[*words, "--", *positional], standalone_mode=False)
    except PARSER_ERROR as error:
        raise UsageError(_sentence(error)) from error
    if result == 130:
        raise KeyboardInterrupt
    return result


def _public_name(parameter: Any) -> str:
    """Return the name of an option on the command line, with underscores."""
    return parameter.opts[0].lstrip("-").replace("-", "_")
