"""The runs in a folder: state, step, best validation, size and date, and what of them can be removed."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lcmdistill.objectives.recorded import load_run_config
from lcmdistill.training.best import best_of, history
from lcmdistill.training.run_settings import finished_step
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.metrics_log import read_metrics
from lcmdistill.utils.run_dir import checkpoint_step, checkpoints, is_in_use
from lcmdistill.utils.run_names import all_runs


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        folder: The run folder.
        state: "finished", "running", "stopped" (the same command resumes it), "not started" or "damaged".
        step: The last step that is saved.
        steps: The requested steps; None if the settings cannot be read.
        best: The best validation as text; "" without one.
        size: Bytes on disk.
        changed: When the run last wrote something, in seconds since the epoch.
    """

    folder: Path
    state: str
    step: int
    steps: int | None
    best: str
    size: int
    changed: float


def list_runs(root: Path) -> list[RunSummary]:
    """Return the runs in a folder, the newest first."""
    return sorted((summarize(folder) for folder in all_runs(root)), key=lambda run: -run.changed)


def summarize(folder: Path) -> RunSummary:
    """Return the summary of the run in a folder."""
    saved = checkpoints(folder / "checkpoints")
    step, steps, best, finished = checkpoint_step(saved[-1]) if saved else 0, None, "", None
    state = "damaged"
    try:
        config = load_run_config(folder)
        if config is not None:
            finished, steps = finished_step(folder), config.optim.max_train_steps
            state = "finished" if finished is not None and finished >= steps else "stopped" if saved else "not started"
            metric = config.run.best_metric
            if values := history(folder, metric):
                best = "{1:.3g} {2} at step {0}".format(*best_of(metric, values), metric)
    except UsageError:
        pass  # listed as damaged; every command that needs its settings states why
    if is_in_use(folder):
        state = "running"
        step = max([step, *(int(line["step"]) for line in read_metrics(folder)[-1:])])
    size, changed = _size_and_time(folder)
    return RunSummary(folder, state, step or finished or 0, steps, best, size, changed)


def _size_and_time(folder: Path) -> tuple[int, float]:
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(each.st_size for each in stats), max((each.st_mtime for each in stats), default=0.0)


def remove_run(folder: Path) -> None:
    """Remove a run folder with everything in it.

    Raises:
        UsageError: It is not a run, or it is running.
    """
    check_removable(folder)
    shutil.rmtree(folder)


def check_removable(folder: Path) -> None:
    """Raise UsageError unless a folder is a run that is not running."""
    if folder.is_symlink() or folder not in all_runs(folder.parent):
        raise UsageError(f"{folder} is not a run folder; lcmdistill runs lists the runs")
    if is_in_use(folder):
        raise UsageError(f"{folder} is running; stop it first (Ctrl-C in its terminal)")


def removable_checkpoints(run: RunSummary) -> list[Path]:
    """Return the checkpoints of a finished run that no command needs but one that trains it further.

    A LoRA is exported from its last checkpoint, which therefore stays, and so does `best`.
    """
    config = load_run_config(run.folder) if run.state == "finished" else None
    if config is None:
        return []
    saved = checkpoints(run.folder / "checkpoints")
    return saved[:-1] if config.student.kind == "lora" else saved


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return _size_and_time(folder)[0]
