"""The checkouts and the environments of other programs; tests without one of them are skipped."""

import os
from pathlib import Path

import pytest

from tests.support.clients import ROOT, build_base


@pytest.fixture(scope="session")
def clients_python() -> str:
    """The Python of the environment that `make clients` builds."""
    python = Path(os.environ.get("LCMDISTILL_CLIENTS_PYTHON", ROOT / ".venv-clients" / "bin" / "python"))
    if not python.exists():
        pytest.skip("there is no .venv-clients; build it with: make clients")
    return str(python)


@pytest.fixture(scope="session")
def sd_scripts_python() -> str:
    """The Python of the environment with the versions that sd-scripts needs, which `make clients` builds."""
    python = Path(os.environ.get("LCMDISTILL_SD_SCRIPTS_PYTHON", ROOT / ".venv-sd-scripts" / "bin" / "python"))
    if not python.exists():
        pytest.skip("there is no .venv-sd-scripts; build it with: make clients")
    return str(python)


@pytest.fixture(scope="session")
def comfyui() -> str:
    """The folder of a checkout of ComfyUI."""
    if "LCMDISTILL_COMFYUI" not in os.environ:
        pytest.skip("LCMDISTILL_COMFYUI does not name a checkout of ComfyUI")
    return os.environ["LCMDISTILL_COMFYUI"]


@pytest.fixture(scope="session")
def sd_scripts() -> str:
    """The folder of a checkout of sd-scripts."""
    if "LCMDISTILL_SD_SCRIPTS" not in os.environ:
        pytest.skip("LCMDISTILL_SD_SCRIPTS does not name a checkout of sd-scripts")
    return os.environ["LCMDISTILL_SD_SCRIPTS"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 in full size with random weights."""
    return build_base(tmp_path_factory.mktemp("clients") / "base")
