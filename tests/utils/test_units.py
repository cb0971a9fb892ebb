"""Numbers as people read them."""

import pytest

from lcmdistill.utils.units import counted, duration_text, size_text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 kB"), (12_300, "12 kB"), (3.4e8, "340 MB"), (1.24e9, "1.2 GB"), (4.5e12, "4.5 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (12, "12 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 4 h"),
        (59.6, "1 min 00 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 images"), (1, "1 image"), (1200, "1,200 images")])
def test_counts(count: int, text: str) -> None:
    assert counted(count, "image") == text


def test_other_plurals() -> None:
    assert counted(2, "entry", "entries") == "2 entries"
