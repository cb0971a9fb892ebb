"""Helpers that several tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcmdistill.config.schema import RunConfig
from lcmdistill.objectives import OBJECTIVES
from tests.support.runs import resolve
from tests.support.teachers import SMALL

PlannedRunner = Callable[..., Path]


def configured(small_teacher: Path, **changes: Any) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    own = {"teacher.model": str(small_teacher), "run.device": "cpu", "data.resolution": 32, "student.rank": 8}
    own = {**SMALL, **own, **changed}
    method = {f"objective.{name}" for name in OBJECTIVES[own.get("objective.name", "lcm")].__dataclass_fields__}
    known = {k: v for k, v in own.items() if not k.startswith("objective.") or k in method | {"objective.name"}}
    return resolve({}, known)


TIGHT = 0.6 + 1.1 * 0.0073
"GiB of a GPU of which 7.5 MiB are left for tensors, half of what this run takes by default"
