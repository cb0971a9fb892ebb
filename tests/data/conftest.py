"""Fixtures shared by this folder."""

from pathlib import Path

import pytest

from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from tests.support.data import good, write_tar


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Teacher:
    return load_teacher(str(small_teacher))


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return str(write_tar(tmp_path / "data.tar", [*good(range(5)), ("bad.txt", b"a"), *good(range(5, 10))]))
