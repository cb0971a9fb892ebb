"""The documents of a finished run: its model card and its report."""

from pathlib import Path
from shlex import quote

from lcmdistill.config.schema import RunConfig
from lcmdistill.hub.model_card import model_card, write_run_card
from lcmdistill.report.page import write_report
from lcmdistill.report.uses import run_library_line, uses
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.naming import public_path
from lcmdistill.training.documents import RunDocuments


def write_documents(config: RunConfig, folder: Path, teacher: Teacher) -> None:
    """Write README.md and report.html into a run folder."""
    write_run_card(config, folder, teacher)
    write_report(folder)


def instructions(config: RunConfig, folder: Path) -> list[str]:
    """Return how a run's student is used, a line per program: the file, its place, sampler, steps, CFG."""
    entries = uses(folder, config, None)
    programs = [entry for entry in entries if entry["name"] not in ("diffusers", "Command line")]
    lines = []
    if code := next((entry["code"] for entry in programs if entry["code"]), None):
        names = " and ".join(entry["name"] for entry in programs if entry["code"])
        lines.append(f"  a single file for {names}: {_typed(code, folder)}")
    for entry in programs:
        first = 1 if entry["code"] else 0  # which says to write that file
        lines.append(f"  {entry['name']}: {' '.join(line for line in entry['lines'][first:] if line)}")
    lines.append(f"  {run_library_line(folder, config)}")
    command = entries[-1]["code"].partition(" --prompt")[0]
    return [*lines, f"  report: {folder / 'report.html'}", f"  try: {_typed(command, folder)}"]


def _typed(command: str, folder: Path) -> str:
    """Return a command of the documents, which name a folder without its place, as it works where it is typed."""
    return command.replace(quote(public_path(folder)), quote(str(folder)), 1)


DOCUMENTS = RunDocuments(card=model_card, write=write_documents, instructions=instructions)
