"""`lcmdistill runs`: list, remove and clean runs."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from lcmdistill.cli._aliases import Commands
from lcmdistill.cli._options import Debug, Yes, run_folder
from lcmdistill.cli._output import confirm, print_table
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_names import RUNS
from lcmdistill.utils.units import counted, date_text, size_text

logger = logging.getLogger(__name__)

Folder = Annotated[Path, typer.Option(help="Folder that holds the runs.")]


def runs(ctx: typer.Context, folder: Folder = RUNS, debug: Debug = False) -> None:
    """List the runs: state, step, best validation, size, date. Subcommands remove runs or their checkpoints."""
    if ctx.invoked_subcommand is None:
        list_(folder)


def list_(folder: Folder = RUNS, debug: Debug = False) -> None:
    """List the runs."""
    from lcmdistill.report.runs import list_runs

    found = list_runs(folder)
    if not found:
        logger.info(f"there are no runs in {folder}/; train one: lcmdistill distill --teacher tiny")
        return
    rows = [
        (
            run.folder.name,
            run.state,
            f"{run.step}/{run.steps or '?'}",
            run.best or "-",
            size_text(run.size),
            date_text(run.changed),
        )
        for run in found
    ]
    print_table(("name", "state", "step", "best", "size", "date"), rows)
    logger.info(f"{counted(len(found), 'run')}, {size_text(sum(run.size for run in found))}")


def remove(
    names: Annotated[list[Path], typer.Argument(metavar="NAME...", help="Runs, by name or folder.")],
    yes: Yes = False,
    debug: Debug = False,
) -> None:
    """Delete runs with everything in their folders."""
    from lcmdistill.report.runs import check_removable, folder_size, remove_run

    found = [_existing(name) for name in names]
    for each in found:
        check_removable(each)
    size = sum(map(folder_size, found))
    if confirm(f"Delete {', '.join(map(str, found))} ({size_text(size)})?", yes=yes):
        for each in found:
            remove_run(each)
        logger.info(f"removed {counted(len(found), 'run')}, {size_text(size)}")


def clean(
    names: Annotated[
        list[Path] | None, typer.Argument(metavar="NAME...", help="Finished runs.  [default: all finished runs]")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Delete the checkpoints of finished runs, except what exports need.")
    ] = False,
    folder: Folder = RUNS,
    yes: Yes = False,
    debug: Debug = False,
) -> None:
    """Free disk space of finished runs: their results stay, and they cannot be trained further."""
    if not checkpoints:
        raise UsageError("runs clean deletes checkpoints and nothing else; add --checkpoints to confirm that")
    from lcmdistill.report.runs import folder_size, list_runs, removable_checkpoints, summarize
    from lcmdistill.utils.checkpoint import remove_checkpoint

    found = [summarize(_existing(name)) for name in names] if names else list_runs(folder)
    if unfinished := [str(run.folder) for run in found if names and run.state != "finished"]:
        raise UsageError(
            f"{', '.join(unfinished)}: not finished, so the checkpoints are needed; name finished runs only"
        )
    paths = [path for run in found for path in removable_checkpoints(run)]
    size = sum(map(folder_size, paths))
    if not paths:
        logger.info("there are no checkpoints to delete")
    elif confirm(f"Delete {counted(len(paths), 'checkpoint')} ({size_text(size)})?", yes=yes):
        for path in paths:
            remove_checkpoint(path)
        logger.info(f"removed {counted(len(paths), 'checkpoint')}, {size_text(size)}")


def _existing(name: Path) -> Path:
    """Return the folder of a run. Raises UsageError if it does not exist."""
    from lcmdistill.objectives.recorded import require_run_config
    from lcmdistill.utils.run_names import all_runs

    run = run_folder(name)
    if run not in all_runs(run.parent):
        require_run_config(run)
    return run


def add_to(app: typer.Typer, **options: Any) -> None:
    """Add the command and its subcommands to the application."""
    group = typer.Typer(
        cls=Commands,
        invoke_without_command=True,
        rich_markup_mode=None,
        context_settings=options["context_settings"],
    )
    group.callback()(runs)
    group.command("list", **options)(list_)
    group.command("remove", **options)(remove)
    group.command("rm", hidden=True, **options)(remove)
    group.command("clean", **options)(clean)
    app.add_typer(group, name="runs", short_help="List and remove runs.")
