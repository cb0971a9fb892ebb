"""The cache's size limit: what is removed, in which order, and that nothing else ever is."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from lcmdistill.data.chunks import write_tensors
from lcmdistill.data.eviction import MARKER, claim_folder, evict_lru
from tests.support.runs import distill, resolve
from tests.support.speed import Settings


def entry(root: Path, kind: str, number: int, age: int = 0) -> Path:
    """A cache folder of 1000 bytes, as a run makes it."""
    folder = claim_folder(root / kind / f"{number:024x}")
    (folder / "0.safetensors").write_bytes(bytes(1000))
    os.utime(folder, (1000 - age, 1000 - age))
    return folder


def test_the_least_recently_used_entries_are_removed(tmp_path: Path) -> None:
    kinds = ("latents", "teacher-outputs", "latents", "latents")
    folders = [entry(tmp_path, kind, age, age) for age, kind in enumerate(kinds)]
    oldest = folders[3]
    assert evict_lru(tmp_path, 2500, [oldest]) == 2000  # the oldest is needed, and the two after it go
    assert [folder.is_dir() for folder in folders] == [True, False, False, True]
    assert evict_lru(tmp_path, 2500, []) == 0
    assert evict_lru(tmp_path, 0, [oldest]) == 1000
    assert oldest.is_dir()
    assert not list(tmp_path.rglob("*.old"))


def test_what_evaluations_generated_counts_and_is_removed(tmp_path: Path) -> None:
    home, digest = tmp_path / "evaluation", "a" * 24
    files = [home / f"{name}{digest}.safetensors" for name in ("", "trajectory-", "validation-")]
    for path in files:
        write_tensors(path, {"latents": torch.zeros(500)})
    beginning = claim_folder(home / f"beginning-{digest}")
    (beginning / "1.safetensors").write_bytes(bytes(2000))
    for age, path in enumerate((*files, beginning)):
        os.utime(path, (1000 - age, 1000 - age))
    sizes = [path.stat().st_size for path in files]
    assert evict_lru(tmp_path, sum(sizes) + 2000, []) == 0
    assert evict_lru(tmp_path, sum(sizes) + 1999, []) == 2000
    assert evict_lru(tmp_path, sizes[2], [files[2]]) == sizes[0] + sizes[1]
    assert sorted(home.iterdir()) == [files[2]]
    assert evict_lru(tmp_path, 0, []) == sizes[2]


@pytest.mark.parametrize("is_marked", [False, True])
@pytest.mark.parametrize("name", ["cats", "exam 2024", "abc", "0" * 23, "0" * 25, "A" * 24, ".backup.old"])
def test_folders_of_the_user_are_never_removed(tmp_path: Path, name: str, is_marked: bool) -> None:
    for kind in ("latents", "teacher-outputs", "evaluation"):
        folder = tmp_path / kind / name
        folder.mkdir(parents=True)
        (folder / "mine.bin").write_bytes(bytes(1000))
        if is_marked:
            (folder / MARKER).touch()
    assert evict_lru(tmp_path, 0, []) == 0
    assert len(list(tmp_path.rglob("mine.bin"))) == 3


def test_a_name_without_the_mark_is_not_enough(tmp_path: Path) -> None:
    folder, file = tmp_path / "latents" / ("0" * 24), tmp_path / "evaluation" / f"{'0' * 24}.safetensors"
    folder.mkdir(parents=True)
    file.parent.mkdir()
    (folder / "mine.bin").write_bytes(bytes(1000))
    file.write_bytes(bytes(1000))
    elsewhere = entry(tmp_path / "elsewhere", "latents", 1)
    (tmp_path / "latents" / ("1" * 24)).symlink_to(elsewhere)
    assert evict_lru(tmp_path, 0, []) == 0
    assert (folder.is_dir(), file.is_file(), (elsewhere / "0.safetensors").is_file()) == (True, True, True)


@pytest.mark.parametrize("name", ["notes.txt", "mine.safetensors", "whole-day.mp4", ".hidden", "pictures"])
def test_files_of_the_user_in_a_folder_of_the_cache_are_kept(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = entry(tmp_path, "latents", 0)
    for own in ("whole-all", "00000000-00000128.16x16.part", ".00000000-00000128.safetensors.host-12"):
        (folder / own).touch()
    mine = folder / name
    if name == "pictures":
        mine.mkdir()
        mine = mine / "0.safetensors"
    mine.write_bytes(bytes(500))
    assert evict_lru(tmp_path, 0, []) == 1000
    assert [path for path in folder.rglob("*") if path.is_file()] == [mine]
    assert f"{folder} contains files that this program did not write, such as {name}; they are kept" in caplog.text
    assert evict_lru(tmp_path, 0, []) == 0


def test_claiming_a_folder_again_marks_it_as_used(tmp_path: Path) -> None:
    used, unused = entry(tmp_path, "latents", 0, age=5), entry(tmp_path, "latents", 1)
    assert claim_folder(used) == used
    assert evict_lru(tmp_path, 1500, []) == 1000
    assert (used.is_dir(), unused.is_dir()) == (True, False)


def test_folders_of_an_earlier_version_are_reported_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have no marker, so that nothing but their content shows whose they are."""
    for name in ("0" * 24, "cats"):
        write_tensors(tmp_path / "latents" / name / "00000000-00000128.safetensors", {"mean": torch.zeros(500)})
    entry(tmp_path, "latents", 1)
    assert evict_lru(tmp_path, 0, []) == 1000
    assert "1 cache folders of an earlier version take 0.0 GB, and data.cache_limit does not apply" in caplog.text
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_an_interrupted_removal_is_finished(tmp_path: Path) -> None:
    left = claim_folder(tmp_path / "latents" / f".{'0' * 24}.old")
    (left / "0.safetensors").write_bytes(bytes(10))
    assert evict_lru(tmp_path, 0, []) == 10
    assert not left.exists()


def test_a_folder_that_another_run_removes_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = entry(tmp_path, "latents", 0)
    rename = Path.rename

    def too_late(path: Path, target: Path) -> Path:
        shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", too_late)
    assert evict_lru(tmp_path, 0, []) == 0
    assert not folder.exists()


def test_a_run_evicts_others_and_keeps_what_it_needs(speed_settings: Settings, tmp_path: Path) -> None:
    cache = Path(speed_settings["data.cache_dir"])
    other = entry(cache, "latents", 0)
    settings = {**speed_settings, "data.teacher_cache_samples": 1, "data.cache_limit": 1e-9}
    settings |= {"run.validate_every": 4, "run.validation_prompts": ("red heart",)}
    distill(resolve({}, settings))
    assert not other.exists()
    files = {path: path.stat().st_ino for path in cache.rglob("*.safetensors")}
    assert {path.relative_to(cache).parts[0] for path in files} == {"latents", "teacher-outputs", "evaluation"}
    assert {path.parent.name.split("-")[0] for path in files} >= {"evaluation", "beginning"}
    distill(resolve({}, {**settings, "run.output": str(tmp_path / "again")}))
    assert {path: path.stat().st_ino for path in cache.rglob("*.safetensors")} == files


def test_an_entry_of_another_user_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = entry(tmp_path, "latents", 0)

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    assert evict_lru(tmp_path, 0, []) == 0
    assert folder.exists()
    assert "cannot be removed (Permission denied)" in caplog.text
