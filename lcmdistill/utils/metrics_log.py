"""Numbers of a run over its steps: `metrics.jsonl` always, and a tracker on request. `METRICS` names them all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.checksums import checksum_of_text
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.trackers import make_tracker, tracked

METRICS = {
    "step": "optimizer steps done",
    "loss": "mean loss since the line before, over all processes",
    "grad_norm": "norm of the last step's gradient before clipping",
    "learning_rate": "learning rate of the last step",
    "loss_by_noise": "mean loss in equal parts of the way from clean to noise; null where there was no sample",
    "samples_per_s": "training samples per second, over all processes",
    "data_wait": "share of the time spent waiting for data",
    "seconds_PHASE": "seconds of a phase since the line before: data, encoding, teacher, target, forward, backward, optimizer, "
    "or other (nothing of these); phases in parallel threads each count their own",
    "peak_memory_gib": "most GiB of tensors on the GPU since the line before; on a CPU, of the whole process so far",
    "mfu": "model FLOPs utilization: FLOP/s of the networks as a share of the device's peak, which log.txt names",
    "critic_loss": "distribution matching: mean loss of the critic; it rises at first, then levels out",
    "critic_grad_norm": "distribution matching: mean norm of the critic's gradient before clipping",
    "teacher_gap": "distribution matching: mean |x0 of the student - x0 of the guided teacher|, by which the loss is divided",
    "dm_share": "distribution matching: mean |x0 of the teacher - x0 of the critic|, as a share of teacher_gap",
    "ca_share": "distribution matching: mean size of the guidance term, as a share of teacher_gap",
    "checksum": "checksum of the line without this field",
    "val/METRIC_STEPS": "agreement with the teacher in validation (rmse, ssim) at a number of sampling steps",
}
"what the fields of a line of metrics.jsonl mean; words in capitals stand for several"

_CHECKSUM = "checksum"


class Metrics:
    """Write metrics.jsonl, and log to tensorboard or wandb. Only the main process has one.

    Args:
        folder: The run folder.
        report_to: The tracker, or "none".
        config: The configuration, for the tracker.
        start_step: The step that the run resumes from. Lines of later steps, which the interrupted run wrote after its last
            checkpoint, are removed.

    Raises:
        UsageError: The tracker is not installed.
    """

    def __init__(self, folder: Path, report_to: str, config: Mapping[str, Any], start_step: int) -> None:
        self._tracker = make_tracker(report_to, folder, config, start_step)
        self._path = folder / "metrics.jsonl"
        lines = _lines(self._path)
        write_text(self._path, "".join(f"{line}\n" for line in lines if _step_of(line) <= start_step))

    def log(self, step: int, values: Mapping[str, float], **curves: Sequence[float | None]) -> None:
        """Write one line of numbers, and send it to the tracker. curves: lists of numbers."""
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(_checked(json.dumps({"step": step, **values, **curves})) + "\n")
        if self._tracker is not None:
            self._tracker.log(step, tracked(values, curves))

    def image(self, step: int, name: str, image: Any) -> None:
        """Send a PIL image to the tracker. The caller writes the file."""
        if self._tracker is not None:
            self._tracker.image(step, name, image)

    def close(self) -> None:
        """Flush the tracker."""
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Incomplete, damaged and foreign lines are ignored."""
    return [line for text in _lines(run / "metrics.jsonl") if (line := _parsed(text)) is not None]


def missing_metrics(run: Path, saved_step: int, log_every: int) -> list[str]:
    """Return what is missing in a run's metrics.jsonl, in sentences.

    Args:
        run: The run folder.
        saved_step: The step of the run's newest checkpoint.
        log_every: How many steps a line stands for.
    """
    path, sentences = run / "metrics.jsonl", []
    lines, read = _lines(path), read_metrics(run)
    if len(lines) > len(read):
        count = len(lines) - len(read)
        sentences.append(f"{path}: {count} of {len(lines)} lines cannot be read, and are left out")
    last = int(max((line["step"] for line in read), default=0))
    if saved_step - last >= log_every:
        where = f"ends at step {last}" if path.is_file() else "is missing"
        sentences.append(f"{path} {where}, and the run has {saved_step} steps: its curves are incomplete")
    return sentences


def _checked(text: str) -> str:
    """Return a JSON object with a checksum of its text as its last value."""
    return f'{text[:-1]}, "{_CHECKSUM}": "{checksum_of_text(text)}"}}'


def _is_damaged(text: str) -> bool:
    """Return whether a line differs from what its checksum was made of. Lines of earlier versions have none."""
    start, name, end = text.rpartition(f', "{_CHECKSUM}": ')
    return bool(name) and end != f'"{checksum_of_text(start + chr(125))}"}}'


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _parsed(text: str) -> dict[str, Any] | None:
    """Return a line of metrics; None if it is incomplete or damaged. Values of another type than numbers are left out."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not _is_number(line.get("step")) or _is_damaged(text):
        return None
    return {key: value for key, value in line.items() if (_is_curve if key == "loss_by_noise" else _is_number)(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(each is None or _is_number(each) for each in value)


def _step_of(text: str) -> float:
    """Return the step of a line of metrics. A damaged line counts as later than all others."""
    line = _parsed(text)
    return float("inf") if line is None else line["step"]
