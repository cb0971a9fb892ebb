"""`lcmdistill report`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lcmdistill.cli._options import Debug, run_folder

logger = logging.getLogger(__name__)


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine; it refreshes while training goes on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --watch: the port; 0 takes any free one.")] = 8765,
    debug: Debug = False,
) -> Path:
    """Regenerate RUN/report.html (training, validation, evaluation) and the model card's plots."""
    from lcmdistill.hub.model_card import update_run_card
    from lcmdistill.report.card import write_card_plots
    from lcmdistill.report.page import write_report

    run = run_folder(run)
    if watch:
        from lcmdistill.report.watch import watch as serve

        serve(run, port)
        return run / "report.html"
    page, has_plots = write_report(run), bool(write_card_plots(run))
    card = f", and the plots in {run / 'README.md'}" if has_plots and update_run_card(run) else ""
    logger.info(f"report: {page}{card}")
    return page
