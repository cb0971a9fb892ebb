"""Fixtures shared by this folder."""

from pathlib import Path

import pytest
import torch

from tests.support.models import FAMILY_BUILDERS


def built(folder: Path, family: str) -> Path:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        return FAMILY_BUILDERS[family](folder / family)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> diffusers folder of a small random model."""
    return {name: built(tmp_path_factory.mktemp(name), name) for name in ("sd1", "sd2", "sdxl", "pixart")}
