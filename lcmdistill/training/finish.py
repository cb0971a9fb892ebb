"""The end of a run: the trained student, its documents, the mark that everything is there, and how to use it."""

import logging
from pathlib import Path

from lcmdistill.config.schema import RunConfig
from lcmdistill.export.registry import write_trained_student
from lcmdistill.students.student import Student
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.best import best_checkpoint_advice
from lcmdistill.training.cost_time import REPORT, WRITING
from lcmdistill.training.documents import RunDocuments
from lcmdistill.training.run_settings import mark_finished
from lcmdistill.utils.logging import progress

logger = logging.getLogger(__name__)


def finish(
    config: RunConfig,
    folder: Path,
    teacher: Teacher,
    student: Student,
    step: int,
    documents: RunDocuments,
    seconds: float = 0.0,
) -> None:
    """Write the result of a run, and log where it is and how it is used. For the main process.

    Args:
        config: The resolved configuration.
        folder: The run folder.
        teacher: The teacher.
        student: The trained student.
        step: The last step.
        documents: What the layers above write.
        seconds: How long that is estimated to take.
    """
    with progress(WRITING, 2) as bar:
        bar.update(0, left=seconds)
        if not bar.visible:
            logger.info(f"{WRITING}: student, card and report  {bar.left_text}")
        path = write_trained_student(config, folder, teacher, student, documents.card(config, folder, teacher))
        bar.update(1, left=REPORT)
        documents.write(config, folder, teacher)
        bar.update(2, left=0.0)
    mark_finished(folder, step)
    if advice := best_checkpoint_advice(folder, config.run.best_metric):
        logger.info(advice)
    logger.info(f"done: {path} generates in {config.objective.info.steps(config.objective).text}")
    for line in documents.instructions(config, folder):
        logger.info(line)
