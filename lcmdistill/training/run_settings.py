"""The run folder: which run it holds, whether this command may resume it, and the configuration it was started with."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.resolve import has_key, keys_with, with_values
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, to_toml
from lcmdistill.data.survey import usable_count
from lcmdistill.objectives.recorded import has_trained_student, load_run_config, resumable_config
from lcmdistill.sampling.prompts import nearest_validated
from lcmdistill.students.student import guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.lora.fuse import lora_checksums
from lcmdistill.training.run_data import RecordedSource, check_record, is_same_data, sources_of, write_record
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.checkpoint import last_global_batch
from lcmdistill.utils.checksums import verify_checksums
from lcmdistill.utils.errors import UsageError, disk_error, is_utf8
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.launch import num_processes
from lcmdistill.utils.logging import LOG_FILE
from lcmdistill.utils.redact import redact_value
from lcmdistill.utils.run_dir import LOCK, check_writable, checkpoints, step_name

_MARK, _REQUESTED = ".finished", ".requested.json"

OMEGA = ("objective.w_min", "objective.w_max")
"the guidance of training, which a teacher with a published one decides where the command does not"

FREE_GUIDANCE_SCALE = 2.0
"the guidance scale for sampling if CFG acts on the student; high values oversaturate at so few steps"


def resolve_run_defaults(config: RunConfig, world: int, teacher: Teacher) -> RunConfig:
    """Fill in settings that depend on others: teacher, number of samples, length of a curriculum, guidance of validation.

    A resumed run keeps the curriculum and the memory plan that it was started with, whatever its new length. Its samples
    become more with its length, unless their number was chosen.

    Args:
        config: The requested configuration.
        world: The number of processes.
        teacher: The teacher, whose files decide settings that were not chosen.
    """
    # The one guidance that a teacher was published with precedes the defaults of methods, which are those of Stable Diffusion.
    fixed = set(OMEGA) if teacher.usual.keys() >= set(OMEGA) else set()
    config = with_values(
        config,
        {
            k: v
            for k, v in teacher.usual.items()
            if has_key(config, k) and k not in (config.explicit if k in fixed else config.chosen)
        },
    )
    if config.teacher.loras and config.teacher.lora_checksums is None:
        config = with_values(config, {"teacher.lora_checksums": lora_checksums(config.teacher.loras)})
    decided = keys_with(config, "decided_by_teacher")
    config = dataclasses.replace(config, chosen=config.chosen | decided, explicit=config.explicit | set(OMEGA))
    before = resumable_config(folder := Path(config.run.output or ""))
    if before is not None:
        now, planned, same_memory = flatten(config), flatten(before), config.run.memory == before.run.memory
        unchanged = [
            k for k, v in _requested(folder).items() if v == now[k] and (same_memory or k == "optim.optimizer")
        ]
        kept = [*unchanged, *_kept_if_not_chosen(config)]
        config = with_values(config, {key: planned[key] for key in kept})
    optim = config.optim
    max_samples = config.data.max_samples or _sample_count(config, before, world, one_per_prompt=not teacher.in_pixels)
    guidance = config.run.validation_guidance_scale
    if guidance is None:
        kind, omegas = guidance_of(teacher, config.student, config.objective.omega), omega_range(config)
        middle = omegas.middle if omegas else 1.0
        of_input = middle if teacher.family.embeds_guidance else min(7.5, middle)
        guidance = {"baked": 1.0, "free": FREE_GUIDANCE_SCALE, "input": of_input}[kind]
    objective, counts = config.objective, config.objective.info.steps(config.objective)
    best_metric = config.run.best_metric
    if "run.best_metric" not in config.chosen and counts.low == counts.high:
        best_metric = f"ssim_{nearest_validated(counts.recommended)}"
    if getattr(objective, "curriculum_steps", 0) is None:
        whole = getattr(before.objective, "curriculum_steps", None) if before else None
        whole = optim.max_train_steps if whole is None else whole
        objective = dataclasses.replace(objective, curriculum_steps=whole)
    return dataclasses.replace(
        config,
        objective=objective,
        data=dataclasses.replace(config.data, max_samples=max_samples),
        run=dataclasses.replace(config.run, validation_guidance_scale=guidance, best_metric=best_metric),
    )


def _sample_count(config: RunConfig, before: RunConfig | None, world: int, *, one_per_prompt: bool) -> int | None:
    """Return how many samples of each source a run prepares; None for all of them, without a cache.

    The first samples of a longer run are those of the shorter one.

    Args:
        config: The configuration, which chooses no number.
        before: The configuration of the run that it resumes; None of a new run.
        world: The number of processes.
        one_per_prompt: As for `usable_count`.
    """
    optim, kept = config.optim, before.data.max_samples if before else None
    is_longer = before is None or kept is None or optim.max_train_steps > before.optim.max_train_steps
    if not is_longer or config.data.cache != "on":
        return kept
    per_step, sources = optim.batch_size * optim.gradient_accumulation_steps * world, sources_of(config)

    def usable(steps: int) -> int:
        return usable_count(config.data, sources, steps * per_step, one_per_prompt=one_per_prompt)

    is_chosen = before is not None and kept is not None and kept != usable(before.optim.max_train_steps)
    return kept if kept is not None and is_chosen else usable(optim.max_train_steps)


def _requested(folder: Path) -> dict[str, Any]:
    """Return the settings that the command of a started run requested, where the memory plan changed them."""
    try:
        values = parse_json((folder / _REQUESTED).read_text(encoding="utf-8")) if resumable_config(folder) else {}
    except (OSError, ValueError):
        return {}  # no file, or a damaged one: then the settings must be equal
    return values if isinstance(values, dict) else {}


def _kept_if_not_chosen(config: RunConfig) -> set[str]:
    """Return the settings that a resumed run keeps where the command does not choose them: their default was another."""
    return {"data.holdout"} - config.chosen


def finished(config: RunConfig) -> bool:
    """Return whether a run has all requested steps, and its trained student was written after the last of them."""
    folder = Path(config.run.output or "")
    step = finished_step(folder)
    return step is not None and step >= config.optim.max_train_steps


def finished_step(folder: Path) -> int | None:
    """Return the step at which the run in a folder finished; None if it has steps to take, or to write its student."""
    saved, mark = checkpoints(folder / "checkpoints"), folder / _MARK
    text = mark.read_text(encoding="utf-8", errors="replace") if mark.is_file() else ""
    digits = text.removeprefix("step-")
    if not digits.isdecimal() or text != step_name(int(digits)) or not has_trained_student(folder):
        return None
    # Without checkpoints the run was cleaned after it had finished.
    return int(digits) if not saved or saved[-1].name == text else None


def finished_message(config: RunConfig) -> str | None:
    """Return a sentence about a finished run, which may have more steps than were requested; None for another run.

    Raises:
        UsageError: What the run wrote is damaged, and the command cannot repair it while it is there.
    """
    if not finished(config):
        return None
    folder, requested = Path(config.run.output or ""), config.optim.max_train_steps
    for part in ("pipeline", "lora"):
        verify_checksums(folder / part)
    steps = finished_step(folder) or requested
    fewer = (
        f" and keeps them; for a run of {requested} steps use another --output"
        if requested < steps
        else "; nothing to do"
    )
    return f"{folder} is already finished with {steps} steps{fewer}"


def mark_finished(folder: Path, step: int) -> None:
    """Record the step at which a run finished. Call it after everything else is written."""
    write_text(folder / _MARK, step_name(step))


def check_run(config: RunConfig) -> None:
    """Raise UsageError unless the folder is new, empty, or a run of the same configuration that can be resumed."""
    folder = Path(config.run.output or "")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; specify a folder")
    if not is_utf8(str(folder)):
        raise UsageError(
            f"--output {str(folder)!a} is not UTF-8, and its files would not be readable; use another name"
        )
    check_writable(folder)
    first = (LOCK, LOG_FILE, ".config.")  # what a run writes before its configuration
    others = [path for path in folder.iterdir() if not path.name.startswith(first)] if folder.is_dir() else []
    if others and load_run_config(folder) is None:
        raise UsageError(f"--output {folder} contains files that are not from lcmdistill; choose a new or empty folder")
    recorded = resumable_config(folder)
    if recorded is None:
        if (folder / _MARK).is_file() and not finished(config):
            raise UsageError(
                f"the checkpoints of the finished run {folder} were removed, so it cannot be trained further; use another "
                "--output"
            )
        return
    now, before = flatten(config), flatten(recorded)
    undecided = keys_with(config, "decided_by_teacher") - config.chosen | {
        k for k, v in _requested(folder).items() if now[k] == v
    }
    undecided |= _kept_if_not_chosen(config) | (set(OMEGA) - config.explicit)
    same_data = {"data.sources", "data.prompts"} if is_same_data(config, recorded, folder) else set()
    # The same samples per step, on another number of processes.
    world, optim = num_processes(), config.optim
    is_same_batch = (
        last_global_batch(folder / "checkpoints") == optim.batch_size * optim.gradient_accumulation_steps * world
    )
    same_batch = {"optim.batch_size", "optim.gradient_accumulation_steps"} if is_same_batch else set()
    immutable = {*now, *before} - keys_with(config, "mutable_on_resume") - undecided - same_data - same_batch
    keys = sorted(k for k in immutable if now.get(k) != before.get(k))
    if "objective.curriculum_steps" in now and now["objective.curriculum_steps"] != before.get(
        "objective.curriculum_steps"
    ):
        keys.append("objective.curriculum_steps")
    if (now.get("data.max_samples") or math.inf) < (before.get("data.max_samples") or 0):  # samples may be added
        keys.append("data.max_samples")
    if config.optim.lr_scheduler != "constant" and config.optim.max_train_steps != recorded.optim.max_train_steps:
        keys.append("optim.max_train_steps")
    if keys:
        if keys == ["teacher.lora_checksums"]:
            raise UsageError(
                f"a LoRA of the teacher has changed since the run in {folder} started (SHA-256): restore it to resume, or use "
                "another --output"
            )
        first = keys[0]
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        was, is_now = (redact_value(values.get(first)) for values in (before, now))
        raise UsageError(
            f"{folder} contains a run with {first} = {was!r} (this command: {is_now!r}){more}; "
            "use the original settings to resume, or another --output"
        )


def open_run(config: RunConfig, data: Sequence[RecordedSource], requested: RunConfig) -> None:
    """Create the run folder and write the resolved configuration. Only the main process calls it.

    Args:
        config: The resolved configuration.
        data: What each source holds, recorded for resuming.
        requested: The configuration before memory was planned.

    Raises:
        UsageError: The run was started with other data, or the folder cannot be created.
    """
    folder = Path(config.run.output or "")
    if resumable_config(folder):
        check_record(folder, data, config.teacher.model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.toml", to_toml(config))  # first: it marks the folder as a run, to be resumed
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(exist_ok=True)
    except OSError as error:
        if disk_error(error):
            raise
        raise UsageError(f"--output {folder} cannot be created ({error.strerror}); choose another folder") from error
    write_record(folder, data)
    wanted, now = flatten(requested), flatten(config)
    write_text(
        folder / _REQUESTED,
        json.dumps({k: wanted[k] for k in sorted(keys_with(config, "decided_by_memory_plan")) if wanted[k] != now[k]})
        + "\n",
    )
