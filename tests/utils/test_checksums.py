"""Checksums of a folder: a change to any file but the card is noticed."""

from pathlib import Path

import pytest

from lcmdistill.utils.checksums import MANIFEST, verify_checksums, write_checksums
from lcmdistill.utils.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights.bin").write_bytes(bytes(1000))
    (tmp_path / "README.md").write_text("a card")
    write_checksums(tmp_path)
    return tmp_path


def test_an_intact_folder_passes(folder: Path) -> None:
    (folder / "README.md").write_text("another card")
    (folder / "more.txt").touch()
    verify_checksums(folder)
    verify_checksums(folder / "deep")  # which has no record


@pytest.mark.parametrize(("content", "state"), [(bytes(999) + b"\1", "was changed or damaged"), (None, "is missing")])
def test_a_change_is_named_with_what_to_do(folder: Path, content: bytes | None, state: str) -> None:
    file = folder / "deep" / "weights.bin"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"{file} {state}.*to accept a change, remove .*\{MANIFEST}"):
        verify_checksums(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_record_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UsageError, match=rf"\{MANIFEST} is damaged"):
        verify_checksums(folder)
