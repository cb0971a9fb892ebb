"""What a run tells: lines or a progress bar, metrics.jsonl always, and a tracker on request."""

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError


def check_tracker(report_to: str) -> None:
    """Raise UsageError if a tracker's package is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UsageError(f"--report-to {report_to} needs: pip install 'lcmdistill[{report_to}]'")


class Metrics:
    """metrics.jsonl, and tensorboard or wandb beside it. Only the main process has one."""

    def __init__(self, folder: Path, report_to: str, config: Mapping[str, Any], start_step: int) -> None:
        """start_step: lines of later steps, left by a run that was cut off after its last checkpoint, are removed.

        Raises UsageError if the tracker is not installed.
        """
        check_tracker(report_to)
        self._path = folder / "metrics.jsonl"
        old = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        kept = [line for line in old if _step_of(line) <= start_step]
        write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._tensorboard: Any = None
        self._wandb: Any = None
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        elif report_to == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            # An id of the run's own, kept with it: two folders of one name must not be one run to the server.
            kept_id = folder / "wandb-id.txt"
            if not kept_id.is_file():
                write_text(kept_id, uuid.uuid4().hex)
            self._wandb = wandb.init(
                project="lcmdistill",
                name=folder.name,
                id=kept_id.read_text(encoding="utf-8"),
                resume="allow",
                config=dict(config),
            )

    def log(self, step: int, values: Mapping[str, float], **curves: Sequence[float | None]) -> None:
        """One line of numbers, everywhere. curves: lists of numbers, for metrics.jsonl alone."""
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **values, **curves}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Any) -> None:
        """A PIL image to the tracker; the file is the caller's."""
        if self._tensorboard is not None:
            import numpy as np

            self._tensorboard.add_image(name, np.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Flush the trackers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that was cut off, or that is none of ours, is left out."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        found += [told] if isinstance(told, dict) and "step" in told else []
    return found


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut off in the middle counts as late."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
