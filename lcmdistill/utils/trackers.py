"""Experiment trackers: TensorBoard and wandb. Only the main process has one.

Names follow the field: `train/loss`, `train/learning_rate`, `val/rmse_4`. Settings are the tracker's hyper-parameters.
"""

import importlib.util
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)

PROJECT = "lcmdistill"
"the wandb project, unless WANDB_PROJECT names another"


def check_tracker(report_to: str) -> None:
    """Raise UsageError if the package of a tracker is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UsageError(f"--report-to {report_to} needs: pip install 'lcmdistill[{report_to}]'")


class Tracker(Protocol):
    """Where numbers and pictures of a run go besides its folder."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        ...

    def image(self, step: int, name: str, image: Any) -> None:
        """Log a PIL image."""
        ...

    def close(self) -> None:
        """Flush, and stop."""
        ...


def make_tracker(report_to: str, folder: Path, settings: Mapping[str, Any], start_step: int) -> Tracker | None:
    """Return a tracker; None for "none".

    Args:
        report_to: "none", "tensorboard" or "wandb".
        folder: The run folder.
        settings: The run's settings without secrets, {"section.key": value}.
        start_step: The step that the run resumes from.

    Raises:
        UsageError: The tracker is not installed.
    """
    check_tracker(report_to)
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return kinds[report_to](folder, settings, start_step) if report_to != "none" else None


def tracked(values: Mapping[str, float], curves: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Return the numbers of a line of metrics by their names in a tracker: with the prefix train/ or val/."""
    named = {key if "/" in key else f"train/{key}": value for key, value in values.items()}
    for name, curve in curves.items():
        for i, value in enumerate(curve):
            if value is not None:
                low, high = (round(100 * part / len(curve)) for part in (i, i + 1))
                named[f"train/{name}/{low:02d}-{high}%"] = value
    return named


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], start_step: int) -> None:
        """Open the event file and write the settings as hyper-parameters."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        # Not `add_hparams`, which writes to a folder of its own.
        for summary in hparams(plain, {"train/loss": 0.0, "val/rmse_4": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Any) -> None:
        """See `Tracker.image`."""
        import numpy as np

        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class Wandb:
    """A wandb run. Its variables, such as WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME and WANDB_MODE, decide where it goes."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], start_step: int) -> None:
        """Start or resume the wandb run of a run folder."""
        os.environ.setdefault("WANDB_SILENT", "true")  # its own lines would break the bar and fill the log
        import wandb  # pyright: ignore[reportMissingImports]

        # The id is recorded in the run: two folders of the same name must not be one run to the server.
        id_file = folder / "wandb-id.txt"
        if not id_file.is_file():
            write_text(id_file, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.name,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            # Otherwise the command line is uploaded, with every secret in it.
            settings=wandb.Settings(x_disable_meta=True, disable_git=True),
            config={key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        )
        place = getattr(self._run, "url", None) or getattr(self._run, "dir", None)
        if isinstance(place, str):
            logger.info(f"wandb: {place}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Any) -> None:
        """See `Tracker.image`."""
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()
