"""Atomic writes: what is renamed into place is on the disk, file by file and folder by folder."""

import os
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.utils import atomic


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The flushes and renames of a test in their order, with the file names."""
    found: list[tuple[str, str]] = []
    rename, replace = Path.rename, Path.replace

    def flush(handle: int) -> None:
        found.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))

    def renamed(self: Path, target: Any) -> Path:
        found.append(("rename", Path(target).name))
        return rename(self, target)

    def replaced(self: Path, target: Any) -> Path:
        found.append(("rename", Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(atomic, "flush", flush)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name an open file")


@needs_proc
def test_a_file_is_flushed_before_its_rename_and_its_folder_after(
    events: list[tuple[str, str]], tmp_path: Path
) -> None:
    atomic.write_text(tmp_path / "a.txt", "one")
    assert events == [("flush", ".a.partial.txt"), ("rename", "a.txt"), ("flush", tmp_path.name)]


@needs_proc
def test_everything_in_a_folder_is_flushed_before_its_rename(events: list[tuple[str, str]], tmp_path: Path) -> None:
    with atomic.atomic_dir(tmp_path / "new") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "deep.txt").write_text("x")
        (partial / "flat.txt").write_text("x")
    at = events.index(("rename", "new"))
    assert sorted(name for _, name in events[:at]) == [".new.partial", "deep.txt", "flat.txt", "inner"]
    assert events[at + 1 :] == [("flush", tmp_path.name)]


def test_flush_is_the_system_s() -> None:
    """The tests replace it by nothing; a process of its own has the real one."""
    import subprocess
    import sys

    code = "import os; from lcmdistill.utils import atomic; assert atomic.flush is os.fsync"
    subprocess.run([sys.executable, "-c", code], check=True)
