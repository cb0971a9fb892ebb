"""Paths inside a run folder."""

import errno
import tempfile
from pathlib import Path

from lcmdistill.utils.errors import UsageError


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.pt").is_file())


def step_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(path.name.removeprefix("step-"))


def lora_file(run: Path) -> Path:
    """The one file of a run's LoRA. Raises UsageError if there is none yet, or which one it is cannot be told."""
    files = [path for path in sorted((run / "lora").glob("*.safetensors")) if not path.name.startswith(".")]
    if not files:
        raise UsageError(f"the run {run} has no lora/ yet; run its distill-lora command again to finish it")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UsageError(
            f"{run / 'lora'} holds {len(files)} LoRAs ({names}) and the run made one; move the others away"
        )
    return files[0]


def check_writable(path: Path) -> None:
    """Raise UsageError unless a file or folder can be made there; found out by trying, as rights alone do not tell."""
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise UsageError(f"--output {path} cannot be made: {above} is a file; choose another place")
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".lcmdistill-"):
            pass
    except OSError as error:
        why = "no permission" if isinstance(error, PermissionError) else error.strerror
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(f"--output {path} cannot be written: {why} in {above}; choose another place") from error
