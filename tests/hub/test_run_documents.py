"""The lines after a run: their command works where it is typed."""

from pathlib import Path

from lcmdistill.hub.run_documents import instructions
from lcmdistill.objectives.recorded import require_run_config


def test_the_command_names_the_run_with_its_place(small_run: Path) -> None:
    assert small_run.is_absolute()
    *_, report, command = instructions(require_run_config(small_run), small_run)
    assert report == f"  report: {small_run}/report.html"
    assert command == f"  try: lcmdistill sample {small_run} --steps 4"
