"""`lcmdistill cache`: list and clear the cached latents, teacher outputs and evaluation images."""

import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lcmdistill.cli._aliases import Commands
from lcmdistill.cli._options import Debug, Yes
from lcmdistill.cli._output import confirm, print_table
from lcmdistill.utils.units import counted, date_text, size_text

logger = logging.getLogger(__name__)

Folder = Annotated[
    Path | None, typer.Option(help="Folder of the cache.  [default: $LCMDISTILL_CACHE, otherwise ~/.cache/lcmdistill]")
]


def cache(ctx: typer.Context, folder: Folder = None, debug: Debug = False) -> None:
    """List what is cached between runs: latents, teacher outputs, evaluation images. The subcommand clears it."""
    if ctx.invoked_subcommand is None:
        list_entries(folder)


def list_entries(folder: Folder = None, debug: Debug = False) -> None:
    """List what is cached."""
    from lcmdistill.data.eviction import cache_entries

    root = _root(folder)
    entries = cache_entries(root)
    if not entries:
        logger.info(f"{root}: empty")
        return
    used_by = _users()
    rows = [
        (
            entry.path.name,
            entry.kind,
            size_text(entry.size),
            date_text(entry.last_used),
            ", ".join(used_by.get(entry.path.name, ())) or "-",
        )
        for entry in reversed(entries)
    ]
    print_table(("entry", "kind", "size", "last used", "runs"), rows)
    logger.info(f"{root}: {size_text(sum(entry.size for entry in entries))}; data.cache_limit evicts the oldest first")


def clear(
    entries: Annotated[
        list[str] | None, typer.Argument(metavar="ENTRY...", help="Entries as listed.  [default: all entries]")
    ] = None,
    days: Annotated[
        float, typer.Option("--older-than", min=0, help="Only entries that no run has used for this many days.")
    ] = 0.0,
    folder: Folder = None,
    yes: Yes = False,
    debug: Debug = False,
) -> None:
    """Delete cached entries; a run that needs them makes them again."""
    from lcmdistill.data.eviction import cache_entries, remove_entries
    from lcmdistill.utils.errors import UsageError

    root = _root(folder)
    found = [each for each in cache_entries(root) if each.last_used <= time.time() - days * 86400]
    if entries:
        names = {each.path.name for each in found}
        if unknown := [word for word in entries if not any(name.startswith(word) for name in names)]:
            raise UsageError(f"{root} has no entry {unknown[0]!r}; lcmdistill cache lists them")
        found = [each for each in found if each.path.name.startswith(tuple(entries))]
    size = sum(each.size for each in found)
    if not found:
        logger.info(f"{root}: nothing to clear")
    elif confirm(f"Delete {counted(len(found), 'cache entry', 'cache entries')} ({size_text(size)})?", yes=yes):
        logger.info(f"{root}: removed {size_text(remove_entries(found))}")


def _root(folder: Path | None) -> Path:
    from lcmdistill.config.schema import DataConfig
    from lcmdistill.data.latent_cache import cache_root

    return cache_root(DataConfig(cache_dir=None if folder is None else str(folder)))


def _users() -> dict[str, list[str]]:
    """Return the names of the runs under runs/ by the latents that they are trained on."""
    from lcmdistill.training.run_data import read_record
    from lcmdistill.utils.run_names import all_runs

    users: dict[str, list[str]] = {}
    for run in all_runs():
        for source in read_record(run) or ():
            users.setdefault(source.latents, []).append(run.name)
    return users


def add_to(app: typer.Typer, **options: Any) -> None:
    """Add the command and its subcommand to the application."""
    group = typer.Typer(
        cls=Commands,
        invoke_without_command=True,
        rich_markup_mode=None,
        context_settings=options["context_settings"],
    )
    group.callback()(cache)
    group.command("list", **options)(list_entries)
    group.command("clear", **options)(clear)
    app.add_typer(group, name="cache", short_help="List and clear what is cached between runs.")
