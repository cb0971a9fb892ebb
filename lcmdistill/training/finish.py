"""The end of a run: the trained student, its documents, the mark that everything is there, and how to use it."""

import logging
from pathlib import Path

from lcmdistill.config.schema import RunConfig
from lcmdistill.export.registry import write_trained_student
from lcmdistill.students.student import Student
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.best import best_checkpoint_advice
from lcmdistill.training.documents import RunDocuments
from lcmdistill.training.run_settings import mark_finished

logger = logging.getLogger(__name__)


def finish(
    config: RunConfig, folder: Path, teacher: Teacher, student: Student, step: int, documents: RunDocuments
) -> None:
    """Write the result of a run, and log where it is and how it is used. For the main process.

    Args:
        config: The resolved configuration.
        folder: The run folder.
        teacher: The teacher.
        student: The trained student.
        step: The last step.
        documents: What the layers above write.
    """
    path = write_trained_student(config, folder, teacher, student, documents.card(config, folder, teacher))
    documents.write(config, folder, teacher)
    mark_finished(folder, step)
    if advice := best_checkpoint_advice(folder, config.run.best_metric):
        logger.info(advice)
    logger.info(f"done: {path} generates in {config.objective.info.steps(config.objective).text}")
    for line in documents.instructions(config, folder):
        logger.info(line)
