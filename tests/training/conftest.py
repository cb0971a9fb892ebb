"""Fixtures shared by this folder."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.methods import MethodRunner
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL
from tests.support.training import Runner


@pytest.fixture
def method_run(tmp_path: Path, small_teacher: Path, small_run: Path, image_folder: Path) -> MethodRunner:
    """Run a small training of an objective into tmp_path / name. Keys are spelled with a double underscore."""

    def method_run(objective: str, name: str = "run", **changes: Any) -> Path:
        small = {key: value for key, value in SMALL.items() if not key.startswith("objective.")}
        settings = {**small, "data.sources": (str(image_folder),), "objective.name": objective}
        settings |= {"teacher.model": str(small_run if objective == "lcf" else small_teacher)}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return distill(resolve({}, {"run.output": str(tmp_path / name), **settings}))

    return method_run


@pytest.fixture(scope="module")
def tcd_lora(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("tcd")
    settings = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),), "student.kind": "lora"}
    settings |= {
        "objective.name": "tcd",
        "student.rank": 4,
        "student.alpha": 3.0,
        "data.cache_dir": str(folder / "cache"),
    }
    return distill(resolve({}, {**SMALL, **settings, "run.output": str(folder / "tcd-lora")}))


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path) -> Path:
    """The folder of a finished run with the settings of `train_run`. Tests read it only."""
    folder = tmp_path_factory.mktemp("plain")
    settings = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),)}
    settings |= {"data.cache_dir": str(folder / "cache"), "run.output": str(folder / "run")}
    return distill(resolve({}, {**SMALL, **settings}))


@pytest.fixture
def train_run(tmp_path: Path, train_settings: dict[str, Any]) -> Runner:
    """Run a small distillation into tmp_path / name. Keys are spelled with a double underscore."""

    def train_run(name: str = "run", **changes: Any) -> Path:
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        return distill(resolve({}, {**train_settings, "run.output": str(tmp_path / name), **changed}))

    return train_run
