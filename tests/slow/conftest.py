"""Fixtures shared by this folder."""

import pytest


@pytest.fixture(autouse=True)
def _charts() -> None:
    """Plot the charts."""


@pytest.fixture(autouse=True)
def _short_references() -> None:
    """Use the full number of steps."""
