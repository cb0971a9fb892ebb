"""The documents of a finished run: its model card and its report."""

from pathlib import Path

from lcmdistill.config.schema import RunConfig
from lcmdistill.hub.model_card import model_card, write_run_card
from lcmdistill.report.page import write_report
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.trainer import RunDocuments


def write_documents(config: RunConfig, folder: Path, teacher: Teacher) -> None:
    """Write README.md and report.html into a run folder."""
    write_run_card(config, folder, teacher)
    write_report(folder)


DOCUMENTS = RunDocuments(card=model_card, write=write_documents)
