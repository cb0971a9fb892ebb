"""Fixtures shared by this folder."""

import pytest


@pytest.fixture(autouse=True)
def _charts() -> None:
    """Plot the charts."""
