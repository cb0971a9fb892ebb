"""A run's folder: whose it is, whether this command may go on in it, and the configuration it was started with."""

import dataclasses
import errno
import json
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.checkpoint import checkpoints, step_name, step_of, write_text
from lcmdistill.config import flatten, has_key, to_toml, with_values
from lcmdistill.data.cache import usable_count
from lcmdistill.errors import UsageError
from lcmdistill.methods import FREE_GUIDANCE, omega_range
from lcmdistill.settings import SECTIONS, RunConfig, TeacherConfig
from lcmdistill.student import guidance_of
from lcmdistill.teachers.base import Teacher

_MARK, _DATA, _ASKED = ".finished", ".data.json", ".asked.json"

# Keys that change neither the result nor its place: a resumed run may say them differently.
FREE_TO_DIFFER = {
    "optim.max_train_steps",
    "objective.curriculum_steps",
    "data.count",
    "data.cache_dir",
    "data.cache_limit",
    "run.output",
    "run.device",
    "run.memory",
    "run.compile",
    "run.gradient_checkpointing",
    "student.offload_target",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.validate_every",
    "run.validation_prompts",
    "run.validation_guidance_scale",
    "run.best_metric",
    "run.report_to",
    "run.push_to_hub",
}


# Keys that a teacher's files decide where nobody has chosen: not known before it is loaded.
TEACHERS_OWN = {
    "data.resolution",
    "data.guidance_scale",
    "objective.w_min",
    "objective.w_max",
    "student.target_modules",
}

# Keys that `run.memory` may change, without a change of the global batch.
PLANNED = (
    "run.gradient_checkpointing",
    "student.offload_target",
    "optim.batch_size",
    "optim.accumulate",
    "optim.optimizer",
)


def settle(config: RunConfig, world: int, teacher: Teacher) -> RunConfig:
    """Fill in what depends on the rest: the teacher's own settings, the samples to prepare, the length of a curriculum, and
    the guidance to draw with.

    A run that is resumed keeps the samples, the curriculum and the plan for its memory that it was started with, however long
    it is now to be.
    """
    config = with_values(
        config, {k: v for k, v in teacher.usual.items() if has_key(config, k) and k not in config.chosen}
    )
    config = dataclasses.replace(config, chosen=config.chosen | TEACHERS_OWN)
    before = begun(folder := Path(config.run.output or ""))
    now, same_memory = flatten(config), config.run.memory == before.get("run.memory")
    kept = [k for k, v in _asked(folder).items() if v == now[k] and (same_memory or k == "optim.optimizer")]
    config = with_values(config, {key: before[key] for key in kept if key in before})
    optim = config.optim
    count = config.data.count or before.get("data.count")
    if count is None:
        needed = optim.max_train_steps * optim.batch_size * optim.accumulate * world
        count = usable_count(config.data, needed, one_a_prompt=not teacher.in_pixels)
    guidance = config.run.validation_guidance_scale
    if guidance is None:
        where, omegas = guidance_of(teacher, config.student, config.objective.omega), omega_range(flatten(config))
        guidance = {"baked": 1.0, "free": FREE_GUIDANCE, "input": min(7.5, omegas.middle) if omegas else 1.0}[where]
    objective = config.objective
    if getattr(objective, "curriculum_steps", 0) is None:
        whole = before.get("objective.curriculum_steps", optim.max_train_steps)
        objective = dataclasses.replace(objective, curriculum_steps=whole)
    return dataclasses.replace(
        config,
        objective=objective,
        data=dataclasses.replace(config.data, count=count),
        run=dataclasses.replace(config.run, validation_guidance_scale=guidance),
    )


def takes_omega(run: Path) -> bool:
    """Whether the U-Net of a finished run's pipeline has an omega input, by its file. Raises UsageError if that is no JSON."""
    path = run / "pipeline" / "unet" / "config.json"
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("time_cond_proj_dim") is not None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


def recorded(folder: Path) -> dict[str, Any]:
    """{"section.key": value} of the run in a folder; empty if there is none, or another program's config.toml."""
    path = folder / "config.toml"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    sections = {name: values for name, values in tree.items() if isinstance(values, dict)}
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return flat if {"teacher.model", "objective.name", "optim.max_train_steps"} <= flat.keys() else {}


def begun(folder: Path) -> dict[str, Any]:
    """`recorded`, of a run that has a checkpoint to go on from; empty for one that failed before its first."""
    return recorded(folder) if checkpoints(folder / "checkpoints") else {}


def _asked(folder: Path) -> dict[str, Any]:
    """What the command of a begun run had said where its memory's plan says otherwise."""
    path = folder / _ASKED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and begun(folder) else {}


def teacher_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_teacher` is to be told for a recorded run's teacher: model, revision, its VAE and the like."""
    keys = [field.name for field in dataclasses.fields(TeacherConfig)]
    return {key: settings[f"teacher.{key}"] for key in keys if f"teacher.{key}" in settings}


def has_product(folder: Path) -> bool:
    """Whether what a run was for is there: RUN/pipeline of a full student, RUN/lora of an adapter."""
    if recorded(folder).get("student.kind") == "lora":
        return any((folder / "lora").glob("*.safetensors"))
    return (folder / "pipeline" / "model_index.json").is_file()


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


def finished(config: RunConfig) -> bool:
    """Whether a run has all the steps that are asked for, and what it was for was written after the last of them."""
    folder = Path(config.run.output or "")
    saved, mark = checkpoints(folder / "checkpoints"), folder / _MARK
    if not saved or step_of(saved[-1]) < config.optim.max_train_steps or not has_product(folder):
        return False
    return mark.is_file() and mark.read_text(encoding="utf-8") == saved[-1].name


def mark_finished(folder: Path, step: int) -> None:
    """Note, once everything else is written, at which step a run has finished."""
    write_text(folder / _MARK, step_name(step))


def check_place(path: Path) -> None:
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


def check_run(config: RunConfig) -> None:
    """Raise UsageError unless the folder is new, empty, or a run of the same configuration that can be resumed."""
    folder = Path(config.run.output or "")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; name a folder")
    check_place(folder)
    if not recorded(folder) and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--output {folder} holds files that no run of lcmdistill made; choose a new or empty folder")
    before = begun(folder)
    if not before:
        return
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()}
    unsettled = TEACHERS_OWN - config.chosen | {k for k, v in _asked(folder).items() if now[k] == v}
    before = {**_usual(), **before}  # a run that is older than a setting had its default
    keys = sorted(k for k in {*now, *before} - FREE_TO_DIFFER - unsettled if now.get(k) != before.get(k))
    keys += [k for k in ("data.count", "objective.curriculum_steps") if k in now and now[k] != before.get(k)]
    if config.optim.lr_schedule != "constant" and config.optim.max_train_steps != before["optim.max_train_steps"]:
        keys.append("optim.max_train_steps")
    if keys:
        first = keys[0]
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise UsageError(
            f"{folder} holds a run with {first} = {before.get(first)!r}, and this command says {now.get(first)!r}{more}; "
            "repeat the first command to resume it, or name another --output"
        )


def _usual() -> dict[str, Any]:
    """The defaults of the settings that every run has, as a file would say them."""
    every = {
        f"{name}.{field.name}": field.default for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in every.items() if v is not None}


def open_run(config: RunConfig, data: Mapping[str, str], asked: RunConfig) -> None:
    """Make a run's folder and write the settled configuration there: the main process's business alone.

    data: a fingerprint of each source, noted for the day the run is resumed; asked: the configuration before its memory was
    planned. Raises UsageError if the run that is to be resumed was begun with other data.
    """
    folder = Path(config.run.output or "")
    noted = folder / _DATA
    if begun(folder) and noted.is_file():
        before = json.loads(noted.read_text(encoding="utf-8"))
        changed = [spec for spec, fingerprint in data.items() if before.get(spec) != fingerprint]
        if changed:
            raise UsageError(
                f"{folder} was begun when --data {changed[0]} held something else: its files (names, sizes, dates) or the "
                "teacher's weights have changed; put them back to resume, or name another --output"
            )
    try:
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(f"--output {folder} cannot be made ({error.strerror}); choose another folder") from error
    write_text(folder / "config.toml", to_toml(config))
    write_text(noted, json.dumps(data, indent=2) + "\n")
    said, now = flatten(asked), flatten(config)
    write_text(folder / _ASKED, json.dumps({k: said[k] for k in PLANNED if said[k] != now[k]}) + "\n")
