"""Atomic writes, and checkpoints: complete or absent, verified, and restored bit for bit."""

import os
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.utils import atomic as checkpoint
from lcmdistill.utils.atomic import atomic_dir, atomic_file, write_text
from lcmdistill.utils.checkpoint import (
    BEST,
    load_best,
    load_checkpoint,
    load_latest_checkpoint,
    prune,
    save_checkpoint,
)
from lcmdistill.utils.errors import RunError
from lcmdistill.utils.run_dir import checkpoints


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, content: str) -> None:
    with atomic_dir(folder) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "file.txt").write_text(content)


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "a" / "out") as aside:
        (aside / "file.txt").write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert files(tmp_path) == {"a/out/file.txt": b"new"}


def test_a_folder_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new")
    assert files(tmp_path) == {"out/deep/file.txt": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_folder_and_no_leftovers(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "out", "old")

    def fail() -> None:
        with atomic_dir(tmp_path / "out") as aside:
            (aside / "file.txt").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert files(tmp_path) == {"out/deep/file.txt": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_processes_may_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "drawn.json"
    with atomic_file(path, shared=True) as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with atomic_file(path, shared=True) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_shared_file_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    path, host = tmp_path / "it", socket.gethostname()
    for process in (f"{host}-{ended.pid}", f"{host}-1", f"elsewhere-{ended.pid}"):
        (tmp_path / f".it.{process}").touch()
    write_text(path, "new", shared=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == [f".it.elsewhere-{ended.pid}", f".it.{host}-1", "it"]


@pytest.mark.parametrize("way", [atomic_dir, atomic_file])
def test_a_stop_during_the_flush_leaves_nothing(
    way: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync", stop)
    with pytest.raises(KeyboardInterrupt), way(tmp_path / "out") as aside:
        (aside / "file.txt" if aside.is_dir() else aside).write_text("whole")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    """As of a pipeline that was moved to a larger disk, with a link in its place."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pipeline").symlink_to("../elsewhere")
    for content in ("first", "second"):
        with atomic_dir(tmp_path / "run" / "pipeline") as partial:
            (partial / "a.txt").write_text(content)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["pipeline"]
    assert (tmp_path / "run" / "pipeline" / "a.txt").read_text() == "second"
    assert (tmp_path / "elsewhere" / "a.txt").read_text() == "theirs"


def test_a_linked_checkpoint_is_pruned_and_what_it_points_to_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, {"student": {"w": torch.ones(4)}}, {})
    moved = (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "moved")
    (tmp_path / "checkpoints" / "step-00000001").symlink_to(moved)
    prune(tmp_path / "checkpoints", 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert (moved / "state.pt").is_file()


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest.txt").write_text("half")
    write(tmp_path / "out", "new")
    assert files(tmp_path) == {"out/deep/file.txt": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_text_file_is_complete_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old é")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old é"

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old é"


GROUPS: dict[str, dict[str, Tensor]] = {
    "student": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.5)},
    "target": {"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16)},
}


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, GROUPS, {"global_batch": 8, "scaler": {"scale": 2.0}})
    assert path.name == "step-00000012"
    groups, state = load_checkpoint(path)
    assert state == {"step": 12, "global_batch": 8, "scaler": {"scale": 2.0}}
    assert {name: set(tensors) for name, tensors in groups.items()} == {k: set(v) for k, v in GROUPS.items()}
    for name, tensors in GROUPS.items():
        for key, value in tensors.items():
            assert torch.equal(groups[name][key], value)
            assert groups[name][key].dtype == value.dtype


def test_files_have_the_mode_of_any_other_file(tmp_path: Path) -> None:
    """safetensors creates files that only their owner may read."""
    path = save_checkpoint(tmp_path, 3, {"student": {"w": torch.ones(4)}}, {})
    with atomic_file(tmp_path / "lora.safetensors") as aside:
        save_file({"w": torch.ones(4)}, aside)
    (tmp_path / "usual").touch()
    modes = {file.stat().st_mode for file in [*path.iterdir(), *tmp_path.glob("*.safetensors"), tmp_path / "usual"]}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["student.safetensors", "state.pt"])
@pytest.mark.parametrize("size", [0, 20])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, size: int) -> None:
    path = save_checkpoint(tmp_path, 3, {"student": {"w": torch.ones(4)}}, {})
    (path / name).write_bytes((path / name).read_bytes()[:size])
    with pytest.raises(RunError, match=r"step-00000003 is damaged .*remove that folder") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"student": {"w": torch.ones(4)}}, {})
    flip_a_bit(path / "student.safetensors")
    with pytest.raises(RunError, match=r"is damaged \(student.safetensors does not match its checksum\)"):
        load_checkpoint(path)


def test_a_flipped_bit_of_the_state_is_noticed(tmp_path: Path) -> None:
    """Some make torch raise what the damaged bytes ask for, others change a number."""
    path = save_checkpoint(tmp_path, 3, {"student": {"w": torch.ones(4)}}, {"best": 0.25, "checks": [1.5, 2.5]})
    state, unchanged = (path / "state.pt").read_bytes(), load_checkpoint(path)[1]
    for i in range(0, len(state), 3):
        (path / "state.pt").write_bytes(state[:i] + bytes([state[i] ^ 0x11]) + state[i + 1 :])
        with suppress(RunError):
            assert load_checkpoint(path)[1] == unchanged, f"byte {i}"


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, GROUPS, {})
    (path / "target.safetensors").unlink()
    with pytest.raises(RunError, match=r"is damaged .*No such file"):
        load_checkpoint(path)


def test_a_checkpoint_of_an_older_version_has_no_checksums(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, GROUPS, {})
    torch.save({"step": 3}, path / "state.pt")
    assert load_checkpoint(path)[1] == {"step": 3}


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_latest_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"student": {"w": torch.full((4,), float(step))}}, {"value": step})
    latest = load_latest_checkpoint(tmp_path)
    assert latest is not None
    assert (latest.path.name, latest.state) == ("step-00000003", {"step": 3, "value": 3})
    assert capsys.readouterr().out == ""
    flip_a_bit(tmp_path / "step-00000003" / "student.safetensors")
    (tmp_path / "step-00000002" / "state.pt").write_bytes(b"PK")
    latest = load_latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.path.name == "step-00000001"
    assert latest.groups["student"]["w"].tolist() == [1.0] * 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" is damaged (")[0][-13:] for line in lines] == ["step-00000003", "step-00000002"]
    assert all(line.endswith("; trying the checkpoint before it") for line in lines)
    flip_a_bit(tmp_path / "step-00000001" / "student.safetensors")
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged; remove that folder to train again"):
        load_latest_checkpoint(tmp_path)


def test_damaged_checkpoints_after_the_step_that_was_resumed_are_removed(tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, step, GROUPS, {})
    save_checkpoint(tmp_path, 3, GROUPS, {})  # resumed from 2, because 4 is damaged
    prune(tmp_path, 1, last=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("rename", [1, 2])
def test_the_best_weights_survive_a_kill_while_they_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    folder, calls = tmp_path / "checkpoints", []
    save_checkpoint(folder, 1, {"weights": {"w": torch.ones(2)}}, {}, name=BEST)
    original = Path.rename

    def killed(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == rename:
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, 2, {"weights": {"w": torch.zeros(2)}}, {}, name=BEST)
    best = load_best(tmp_path)
    assert best is not None
    assert (best[0], best[1]["w"].tolist()) == (1, [1.0, 1.0])
    save_checkpoint(folder, 3, {"weights": {"w": torch.zeros(2)}}, {}, name=BEST)
    assert [path.name for path in folder.iterdir()] == [BEST]


def test_leftovers_of_killed_processes_are_removed_with_the_next_checkpoint(tmp_path: Path) -> None:
    for name in (".step-00000001.partial", ".step-00000001.old", ".step-00000001.removed", ".best.partial"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path, 2, GROUPS, {})
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".best.partial", "step-00000002"]


def test_the_state_loads_with_weights_only(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, GROUPS, {"global_batch": 8, "scaler": {"scale": torch.tensor(2.0)}})
    assert torch.load(path / "state.pt", weights_only=True)["step"] == 1


def test_a_tensor_that_is_not_contiguous_keeps_its_values(tmp_path: Path) -> None:
    value = torch.arange(6.0).view(2, 3).t()
    groups, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {"student": {"a": value}}, {}))
    assert torch.equal(groups["student"]["a"], value)


def test_complete_checkpoints_are_listed_in_order(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        save_checkpoint(tmp_path, step, GROUPS, {})
    (tmp_path / "step-00000200").mkdir()
    (tmp_path / ".step-00000300.partial").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000020", "step-00000100"]
    assert checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    steps = [1, 2, 3, 4]
    for step in steps:
        save_checkpoint(tmp_path, step, GROUPS, {})
    prune(tmp_path, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in steps[-keep:]]


def test_an_interrupted_removal_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, GROUPS, {})

    def killed(path: Path, **options: bool) -> None:
        os.unlink(path / "student.safetensors")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def model_and_optimizer(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained() -> Any:
    model, optimizer = model_and_optimizer(0)
    steps(model, optimizer, range(3))
    return model, optimizer


def test_an_optimizer_is_restored_bit_for_bit(tmp_path: Path, trained: Any) -> None:
    model, optimizer = trained
    groups = {"student": dict(model.named_parameters()), "optimizer": optimizer_tensors(optimizer)}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 3, groups, {}))
    other, resumed = model_and_optimizer(1)
    other.load_state_dict(loaded["student"])
    restore_optimizer(resumed, loaded["optimizer"])
    before, after = optimizer_tensors(optimizer), optimizer_tensors(resumed)
    assert before.keys() == after.keys() == {f"{i}.{n}" for i in range(4) for n in ("step", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(before[key], after[key]) for key in before)
    steps(model, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_restoring_keeps_the_optimizer_s_settings(trained: Any) -> None:
    _, optimizer = trained
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    other = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.3)
    restore_optimizer(other, optimizer_tensors(optimizer))
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.3)
