"""A run's folder: whose it is, whether this command may go on in it, and the configuration it was started with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.resolve import has_key, keys_with, with_values
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, to_toml
from lcmdistill.data.sources.registry import make_sources
from lcmdistill.data.survey import usable_count
from lcmdistill.objectives.recorded import has_trained_student, load_run_config, resumable_config
from lcmdistill.students.student import guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.errors import UsageError, disk_error
from lcmdistill.utils.logging import LOG_FILE
from lcmdistill.utils.run_dir import LOCK, check_writable, checkpoint_step, checkpoints, step_name

_MARK, _DATA, _ASKED = ".finished", ".data.json", ".asked.json"

FREE_GUIDANCE_SCALE = 2.0
"the guidance scale to generate with where CFG acts on the student; high ones burn the colors at so few steps"


def resolve_run_defaults(config: RunConfig, world: int, teacher: Teacher) -> RunConfig:
    """Fill in what depends on the rest: teacher, number of samples, length of a curriculum, guidance of validation.

    A resumed run keeps the samples, the curriculum and the memory plan that it was started with, whatever its new length.

    Args:
        config: The requested configuration.
        world: The number of processes.
        teacher: The teacher, whose files decide what nobody chose.
    """
    config = with_values(
        config, {k: v for k, v in teacher.usual.items() if has_key(config, k) and k not in config.chosen}
    )
    config = dataclasses.replace(config, chosen=config.chosen | keys_with(config, "decided_by_teacher"))
    before = resumable_config(folder := Path(config.run.output or ""))
    if before is not None:
        now, planned, same_memory = flatten(config), flatten(before), config.run.memory == before.run.memory
        kept = [k for k, v in _asked(folder).items() if v == now[k] and (same_memory or k == "optim.optimizer")]
        config = with_values(config, {key: planned[key] for key in kept})
    optim = config.optim
    max_samples = config.data.max_samples or (before.data.max_samples if before else None)
    if max_samples is None:
        needed = optim.max_train_steps * optim.batch_size * optim.gradient_accumulation_steps * world
        max_samples = usable_count(config.data, make_sources(config.data), needed, one_per_prompt=not teacher.in_pixels)
    guidance = config.run.validation_guidance_scale
    if guidance is None:
        where, omegas = guidance_of(teacher, config.student, config.objective.omega), omega_range(config)
        guidance = {"baked": 1.0, "free": FREE_GUIDANCE_SCALE, "input": min(7.5, omegas.middle) if omegas else 1.0}[
            where
        ]
    objective = config.objective
    if getattr(objective, "curriculum_steps", 0) is None:
        whole = getattr(before.objective, "curriculum_steps", None) if before else None
        whole = optim.max_train_steps if whole is None else whole
        objective = dataclasses.replace(objective, curriculum_steps=whole)
    return dataclasses.replace(
        config,
        objective=objective,
        data=dataclasses.replace(config.data, max_samples=max_samples),
        run=dataclasses.replace(config.run, validation_guidance_scale=guidance),
    )


def _asked(folder: Path) -> dict[str, Any]:
    """What the command of a begun run had said where its memory's plan says otherwise."""
    path = folder / _ASKED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and resumable_config(folder) else {}


def finished(config: RunConfig) -> bool:
    """Whether a run has all the steps that are asked for, and what it was for was written after the last of them."""
    folder = Path(config.run.output or "")
    saved, mark = checkpoints(folder / "checkpoints"), folder / _MARK
    if not saved or checkpoint_step(saved[-1]) < config.optim.max_train_steps or not has_trained_student(folder):
        return False
    return mark.is_file() and mark.read_text(encoding="utf-8") == saved[-1].name


def mark_finished(folder: Path, step: int) -> None:
    """Note, once everything else is written, at which step a run has finished."""
    write_text(folder / _MARK, step_name(step))


def check_run(config: RunConfig) -> None:
    """Raise UsageError unless the folder is new, empty, or a run of the same configuration that can be resumed."""
    folder = Path(config.run.output or "")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; name a folder")
    check_writable(folder)
    own = (LOCK, LOG_FILE, ".config.")  # what a run writes before its configuration is there
    others = [path for path in folder.iterdir() if not path.name.startswith(own)] if folder.is_dir() else []
    if others and load_run_config(folder) is None:
        raise UsageError(f"--output {folder} holds files that no run of lcmdistill made; choose a new or empty folder")
    recorded = resumable_config(folder)
    if recorded is None:
        return
    now, before = flatten(config), flatten(recorded)
    unsettled = keys_with(config, "decided_by_teacher") - config.chosen | {
        k for k, v in _asked(folder).items() if now[k] == v
    }
    keys = sorted(
        k for k in {*now, *before} - keys_with(config, "mutable_on_resume") - unsettled if now.get(k) != before.get(k)
    )
    keys += [k for k in ("data.max_samples", "objective.curriculum_steps") if k in now and now[k] != before.get(k)]
    if config.optim.lr_scheduler != "constant" and config.optim.max_train_steps != recorded.optim.max_train_steps:
        keys.append("optim.max_train_steps")
    if keys:
        first = keys[0]
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise UsageError(
            f"{folder} holds a run with {first} = {before.get(first)!r}, and this command says {now.get(first)!r}{more}; "
            "repeat the first command to resume it, or name another --output"
        )


def open_run(config: RunConfig, data: Mapping[str, str], asked: RunConfig) -> None:
    """Make a run's folder and write the settled configuration there: the main process's business alone.

    data: a fingerprint of each source, noted for the day the run is resumed; asked: the configuration before its memory was
    planned. Raises UsageError if the run that is to be resumed was begun with other data.
    """
    folder = Path(config.run.output or "")
    noted = folder / _DATA
    if resumable_config(folder) and noted.is_file():
        before = json.loads(noted.read_text(encoding="utf-8"))
        changed = [spec for spec, fingerprint in data.items() if before.get(spec) != fingerprint]
        if changed:
            raise UsageError(
                f"{folder} was begun when --data {changed[0]} held something else: its files (names, sizes, dates) or the "
                "teacher's weights have changed; put them back to resume, or name another --output"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.toml", to_toml(config))  # first: it marks the folder as a run, to be resumed
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(exist_ok=True)
    except OSError as error:
        if disk_error(error):
            raise
        raise UsageError(f"--output {folder} cannot be made ({error.strerror}); choose another folder") from error
    write_text(noted, json.dumps(data, indent=2) + "\n")
    said, now = flatten(asked), flatten(config)
    write_text(
        folder / _ASKED,
        json.dumps({k: said[k] for k in sorted(keys_with(config, "decided_by_memory_plan")) if said[k] != now[k]})
        + "\n",
    )
