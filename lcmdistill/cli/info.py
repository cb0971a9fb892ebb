"""`lcmdistill info`."""

from typing import Annotated

import typer

from lcmdistill.cli._options import Debug, model_or_run
from lcmdistill.utils.redact import printable


def info(
    model: Annotated[
        str, typer.Argument(help="A run, a pipeline or LoRA folder, a .safetensors file, an alias or hub id.")
    ],
    debug: Debug = False,
) -> None:
    """Describe a model, a run or a LoRA: family, prediction type, schedule, sizes, license, and what created it."""
    from lcmdistill.report.info import describe

    rows = describe(model_or_run(model) or model)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {printable(text, lines=False)}")
