"""What the layers above training write about a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcmdistill.config.schema import RunConfig
from lcmdistill.teachers.base import Teacher


@dataclass(frozen=True)
class RunDocuments:
    """What the layers above write about a run: each is called with (config, run folder, teacher).

    Attributes:
        card: Returns the text of the model card for the pipeline folder.
        write: Writes the run's own documents, once the trained student is there.
        instructions: Returns how the trained student is used, a line per program.
    """

    card: Callable[[RunConfig, Path, Teacher], str] = lambda config, folder, teacher: ""
    write: Callable[[RunConfig, Path, Teacher], None] = lambda config, folder, teacher: None
    instructions: Callable[[RunConfig, Path], Sequence[str]] = lambda config, folder: ()
