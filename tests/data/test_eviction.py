"""What makes a step cheap leaves its result alone: answers kept, data read ahead, checkpoints written behind, memory layout."""

import os
import shutil
from pathlib import Path

import pytest

from lcmdistill.data.eviction import evict_lru
from tests.support.runs import distill, resolve
from tests.support.speed import Settings


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    made = []
    for age, kind in enumerate(("latents", "answers", "latents", "latents")):
        folder = tmp_path / kind / f"{age:024x}"
        folder.mkdir(parents=True)
        (folder / "0.safetensors").write_bytes(bytes(1000))
        os.utime(folder, (1000 - age, 1000 - age))
        made.append(folder)
    evaluation = tmp_path / "evaluation" / "abc"
    evaluation.mkdir(parents=True)
    oldest = made[3]
    assert evict_lru(tmp_path, 2500, [oldest]) == 2000  # the oldest is needed, and the two after it go
    assert [folder.is_dir() for folder in made] == [True, False, False, True]
    assert evict_lru(tmp_path, 2500, []) == 0
    assert evict_lru(tmp_path, 0, [oldest]) == 1000
    assert oldest.is_dir()
    assert evaluation.is_dir()


def test_room_that_another_run_makes_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "latents" / ("0" * 24)
    folder.mkdir(parents=True)
    (folder / "0.safetensors").write_bytes(bytes(10))
    rename = Path.rename

    def too_late(path: Path, target: Path) -> Path:
        shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", too_late)
    assert evict_lru(tmp_path, 0, []) == 0
    assert not folder.exists()


def test_a_run_makes_room_for_itself_and_keeps_what_it_needs(speed_settings: Settings, tmp_path: Path) -> None:
    cache = Path(speed_settings["data.cache_dir"])
    other = cache / "latents" / ("0" * 24)
    other.mkdir(parents=True)
    (other / "0.safetensors").write_bytes(bytes(10))
    told = {**speed_settings, "data.teacher_cache_samples": 1, "data.cache_limit": 1e-9}
    distill(resolve({}, told))
    assert not other.exists()
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert {path.parent.parent.name for path in files} == {"latents", "answers"}
    distill(resolve({}, {**told, "run.output": str(tmp_path / "again")}))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == files
