"""Recorded runs, read with the registry of objectives that their [objective] section needs."""

from pathlib import Path

from lcmdistill.config.recorded import read_run_config
from lcmdistill.config.schema import RunConfig
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from lcmdistill.utils.run_names import all_runs, did_you_mean


def load_run_config(folder: Path) -> RunConfig | None:
    """Return the configuration of the run in a folder; None if the folder holds no run.

    Raises:
        UsageError: An earlier version wrote the file, or a value in it is not allowed.
    """
    return read_run_config(folder, OBJECTIVES)


def require_run_config(folder: Path) -> RunConfig:
    """Return the configuration of the run in a folder.

    Raises:
        UsageError: The folder holds no run, or its file cannot be read.
    """
    config = load_run_config(folder)
    if config is None:
        there = all_runs(folder.parent)
        runs = ", ".join(map(str, (there or all_runs())[:3]))
        hint = did_you_mean(str(folder)) or (
            f"; {'runs there' if there else 'existing runs'}: {runs}"
            if runs
            else "; pass a run folder such as runs/tiny-lcm"
        )
        raise UsageError(f"{folder} is not a run folder (no config.toml of a run){hint}")
    return config


def resumable_config(folder: Path) -> RunConfig | None:
    """Return the configuration of a run that has a checkpoint to resume from; None of a run that failed before its first."""
    return load_run_config(folder) if checkpoints(folder / "checkpoints") else None


def has_trained_student(folder: Path) -> bool:
    """Return whether a run's student was written: RUN/pipeline of a full student, RUN/lora of an adapter."""
    config = load_run_config(folder)
    if config is not None and config.student.kind == "lora":
        return any((folder / "lora").glob("*.safetensors"))
    return (folder / "pipeline" / "model_index.json").is_file()
