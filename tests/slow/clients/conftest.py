"""The checkouts and the environments of other programs; tests without one of them are skipped."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import ROOT, build_base


def environment_python(variable: str, folder: str) -> str:
    """Return the Python of an environment that `make clients` builds, or skip the test."""
    python = Path(os.environ.get(variable, ROOT / folder / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"there is no {folder}; build it with: make clients")
    return str(python)


def checkout(variable: str, program: str) -> str:
    """Return the folder of a program's checkout, or skip the test."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a checkout of {program}")
    return os.environ[variable]


@pytest.fixture(scope="session")
def clients_python() -> str:
    """The Python of the environment that `make clients` builds."""
    return environment_python("LCMDISTILL_CLIENTS_PYTHON", ".venv-clients")


@pytest.fixture(scope="session")
def sd_scripts_python() -> str:
    """The Python of the environment with the versions that sd-scripts needs, which `make clients` builds."""
    return environment_python("LCMDISTILL_SD_SCRIPTS_PYTHON", ".venv-sd-scripts")


@pytest.fixture(scope="session")
def comfyui() -> str:
    """The folder of a checkout of ComfyUI."""
    return checkout("LCMDISTILL_COMFYUI", "ComfyUI")


@pytest.fixture(scope="session")
def sd_scripts() -> str:
    """The folder of a checkout of sd-scripts."""
    return checkout("LCMDISTILL_SD_SCRIPTS", "sd-scripts")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 in full size with random weights."""
    return build_base(tmp_path_factory.mktemp("clients") / "base")


@pytest.fixture(autouse=True)
def _files_are_removed(tmp_path: Path) -> Iterator[None]:
    """Remove what a test wrote: gigabytes."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
