"""Read the configuration that a run folder records, back into the dataclasses that it was written from."""

import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.config.build import build_section, choose, is_known
from lcmdistill.config.schema import SECTIONS, RunConfig
from lcmdistill.config.toml import ANY_CHECKSUM, CHECKSUM_LINE
from lcmdistill.utils.checksums import checksum_of_text
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.run_dir import looks_like_run

logger = logging.getLogger(__name__)

# Settings by the names that they had before 0.1.0. No run is read by them: a wrong value would pass unseen.
RENAMED = {
    "data.teacher_draws": "data.teacher_cache_samples",
    "data.draw_steps": "data.teacher_steps",
    "data.count": "data.max_samples",
    "optim.accumulate": "optim.gradient_accumulation_steps",
    "optim.lr_schedule": "optim.lr_scheduler",
}

# The keys by which a config.toml is known to be a run's.
_OF_A_RUN = {"teacher.model", "objective.name", "optim.max_train_steps"}


def run_takes_omega(run: Path) -> bool:
    """Return whether the U-Net of a finished run's pipeline has an omega input, according to its config.json.

    Raises:
        UsageError: The file is not valid JSON.
    """
    path = run / "pipeline" / "unet" / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    return isinstance(config, dict) and config.get("time_cond_proj_dim") is not None


def read_run_config(folder: Path, objectives: Mapping[str, Any]) -> RunConfig | None:
    """Return the configuration of the run in a folder; None if the folder holds no run.

    A setting that the file lacks has its default. A setting that this version does not know is counted and logged.
    `teacher.allow_pickle` is not taken from a file, because the run may come from somebody else.

    Args:
        folder: The run folder.
        objectives: The registry of objectives, {name: class}.

    Raises:
        UsageError: The file was written by an earlier version, or a value in it is not allowed.
    """
    path = folder / "config.toml"
    flat = _read_flat(path)
    if not flat.keys() >= _OF_A_RUN:
        if looks_like_run(folder):
            state = "is not the whole configuration of a run" if path.exists() else "is missing"
            raise UsageError(
                f"{path} {state}; restore it, for it decides how the run is resumed and sampled (to use its weights without "
                f"it, pass {folder / 'pipeline'})"
            )
        return None
    flat.pop("teacher.allow_pickle", None)
    if old := sorted(RENAMED.keys() & flat.keys()):
        raise UsageError(
            f"{path} was written by an earlier version: {old[0]} is now called {RENAMED[old[0]]}; rename it in that file, "
            "or start the run again in a new folder"
        )
    _check_whole(path)
    flat.setdefault("data.holdout", 0.0)  # versions without the setting trained on every sample
    try:
        name = choose("objective.name", str(flat.pop("objective.name")), tuple(objectives))
        sections: dict[str, type] = {**SECTIONS, "objective": objectives[name]}
        built = {section: build_section(section, cls, flat) for section, cls in sections.items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error}; correct the file, or choose another run") from error
    if unknown := [key for key in flat if not is_known(key, sections)]:
        logger.info(f"{path}: {len(unknown)} settings are unknown to this version and ignored, such as {unknown[0]}")
    return RunConfig(objective_name=name, chosen=frozenset(flat), **built)


def check_recorded_file(path: Path) -> None:
    """Raise UsageError for the config.toml inside a run folder if it is not what the run wrote; other files are not checked."""
    if path.name == "config.toml" and looks_like_run(path.parent):
        _check_whole(path)


def _check_whole(path: Path) -> None:
    """Raise UsageError if a run's configuration does not end in its checksum."""
    text, _, line = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n")
    if line not in (f"{CHECKSUM_LINE}{checksum_of_text(text + chr(10))}", f"{CHECKSUM_LINE}{ANY_CHECKSUM}"):
        raise UsageError(
            f"{path} was edited or damaged after the run wrote it: its last line is not its checksum; restore the file or, to "
            f'accept it as it is, make its last line "{CHECKSUM_LINE}{ANY_CHECKSUM}"'
        )


def _read_flat(path: Path) -> dict[str, Any]:
    """Return a TOML file's values as {"section.key": value}; empty if there is none, or it is not TOML in sections."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    sections = {name: values for name, values in tree.items() if isinstance(values, dict)}
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
