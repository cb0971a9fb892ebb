"""The command line. Every option is told in plain words; what it means is decided elsewhere, and imported late."""

import os
import sys
import warnings

import typer

from lcmdistill.cli.drawing import sample
from lcmdistill.cli.evaluating import evaluate, report
from lcmdistill.cli.exporting import export
from lcmdistill.cli.training import distill, distill_lora
from lcmdistill.errors import explain

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


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter out of the output; their errors reach the user through ours."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def main() -> None:
    """The console script: one sentence and an exit code for whatever goes wrong, a traceback only with --debug."""
    _quiet_libraries()
    try:
        app()
    except SystemExit:
        raise
    except BaseException as error:
        if "--debug" in sys.argv[1:]:
            raise
        sentence, code = explain(error)
        print(f"Error: {sentence}" if code < 128 else sentence, file=sys.stderr)  # a signal is no error
        sys.exit(code)
