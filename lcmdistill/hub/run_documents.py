"""The documents of a finished run: its model card and its report."""

from pathlib import Path
from shlex import quote

from lcmdistill.config.schema import RunConfig
from lcmdistill.hub.model_card import model_card, write_run_card
from lcmdistill.report.page import write_report
from lcmdistill.report.uses import uses
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.naming import public_path
from lcmdistill.training.documents import RunDocuments


def write_documents(config: RunConfig, folder: Path, teacher: Teacher) -> None:
    """Write README.md and report.html into a run folder."""
    write_run_card(config, folder, teacher)
    write_report(folder)


def instructions(config: RunConfig, folder: Path) -> list[str]:
    """Return how a run's student is used in each program, a line per program: the file, its place, sampler, steps, CFG."""
    entries = uses(folder, config, None)
    programs = [entry for entry in entries if entry["name"] not in ("diffusers", "Command line")]
    lines = [f"  {entry['name']}: {' '.join(line for line in entry['lines'] if line)}" for entry in programs]
    lines += [f"  single file: {code}" for code in {entry["code"] for entry in programs} if code]
    # Documents name a folder without its place; here the command must work where it is typed.
    command = entries[-1]["code"].partition(" --prompt")[0].replace(quote(public_path(folder)), quote(str(folder)))
    return [*lines, f"  report: {folder / 'report.html'}", f"  try: {command}"]


DOCUMENTS = RunDocuments(card=model_card, write=write_documents, instructions=instructions)
