"""The command line: the application, its entry point, and `call`, which runs a command as a function."""

import os
import sys
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Annotated, Any

import typer

from lcmdistill import __version__
from lcmdistill.cli import cache, runs
from lcmdistill.cli._aliases import Command, Commands, options_meant
from lcmdistill.cli._errors import PARSER_ERROR, parser_sentence, report_error
from lcmdistill.cli._options import GroupedCommand
from lcmdistill.cli.distill import distill, distill_lora
from lcmdistill.cli.evaluate import evaluate
from lcmdistill.cli.export import export
from lcmdistill.cli.info import info
from lcmdistill.cli.report import report
from lcmdistill.cli.sample import sample
from lcmdistill.cli.sweep import CONTEXT, sweep
from lcmdistill.training.signals import exit_on_sigterm, ignore_sigterm
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.logging import configure_console
from lcmdistill.utils.runtime import configure_process, exit_without_collecting
from lcmdistill.utils.spelling import or_list

HELP = {"help_option_names": ["-h", "--help"]}


app = typer.Typer(
    cls=Commands,
    context_settings=HELP,
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


for name, (command, summary) in {
    "distill": (distill, "Distill a teacher into a student."),
    "distill-lora": (distill_lora, "Distill a teacher into a small LoRA file."),
    "sample": (sample, "Generate images."),
    "evaluate": (evaluate, "Compare students with their teacher."),
    "report": (report, "Write a run's report page again."),
    "export": (export, "Export to diffusers, ComfyUI, A1111, ONNX."),
    "info": (info, "Describe a model, a run or a LoRA."),
}.items():
    app.command(name, cls=Command, context_settings=HELP, short_help=summary)(command)
app.command("sweep", cls=GroupedCommand, context_settings=CONTEXT, short_help="Train and compare a grid of runs.")(
    sweep
)
for group in (runs, cache):
    group.add_to(app, cls=Command, context_settings=HELP)


def main() -> None:
    """Run the console script: any failure is one sentence and an exit code, and a traceback with --debug."""
    configure_process()
    configure_console()
    with exit_on_sigterm():
        try:
            os.getcwd()  # without a current folder, libraries of torch end the process on their own terms
            result = app(standalone_mode=False)  # an exit code, or what the command returned to `call`
            if sys.stdout is not None:
                sys.stdout.flush()  # a reader that is gone is reported here, and not by Python's exit
            code = result if isinstance(result, int) else 0
            if code == 130:  # which is how Typer passes Ctrl-C on
                raise KeyboardInterrupt
        except BaseException as error:
            ignore_sigterm()
            if "--debug" in sys.argv[1:]:
                raise
            code = report_error(error)
    exit_without_collecting()
    sys.exit(code or 0)


def call(name: str, options: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Any:
    """Call a command as a function, with the checks and defaults of its command line.

    Args:
        name: The command, such as "distill-lora".
        options: The value of each option or argument, by its name with underscores. None is the default; a sequence
            repeats the option.
        settings: The values of --set, by setting.

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
            near = options_meant(key, parameters, trains="set" in parameters)
            hint = f"did you mean {or_list(map(repr, near))}?" if near else f"see lcmdistill {name} --help"
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
    words += [f"--set={key}={_toml(value)}" for key, value in (settings or {}).items()]
    try:
        result = command.main(args=[*words, "--", *positional], standalone_mode=False)
    except PARSER_ERROR as error:
        raise UsageError(parser_sentence(error)) from error
    if result == 130:
        raise KeyboardInterrupt
    return result


def _toml(value: Any) -> str:
    """Return a value as --set takes it: strings as they are, None as "none", other values as TOML."""
    import tomli_w

    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def _public_name(parameter: Any) -> str:
    """Return the name of an option on the command line, with underscores."""
    return parameter.opts[0].lstrip("-").replace("-", "_")
