"""Fixtures shared by this folder."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.memory import TIGHT, PlannedRunner, configured
from tests.support.runs import distill


@pytest.fixture
def planned_run(tmp_path: Path, small_teacher: Path, image_folder: Path) -> PlannedRunner:
    def planned_run(name: str = "run", **changes: Any) -> Path:
        own = {"run__output": str(tmp_path / name), "data__sources": (str(image_folder),), "run__memory": str(TIGHT)}
        return distill(configured(small_teacher, **{**own, **changes}))

    return planned_run
