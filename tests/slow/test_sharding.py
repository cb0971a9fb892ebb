"""Sharded training: each method on two processes, resumed on other numbers of them, and a process that is killed."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import bytes_of, held_bytes, launch, launch_command
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL
from tests.support.training import ROOT, losses

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "lcm": {},
    "lcm-lora": {"student.kind": "lora", "student.rank": 4},
    "pcm": {"objective.name": "pcm"},
    "tdm": {"objective.name": "tdm"},
    "tdm-lora": {"objective.name": "tdm", "student.kind": "lora", "student.rank": 4},
}


def settings_of(method: str, teacher: Path, images: Path, output: Path) -> dict[str, Any]:
    settings = {**SMALL, "teacher.model": str(teacher), "data.sources": (str(images),), "run.output": str(output)}
    settings |= {"optim.batch_size": 2, "optim.gradient_accumulation_steps": 6, "optim.max_train_steps": 20}
    return {**settings, "optim.learning_rate": 1e-4, "run.checkpoint_every": 10, **METHODS[method]}


@pytest.mark.parametrize("method", METHODS)
def test_shards_train_as_one_process_does(method: str, small_teacher: Path, image_folder: Path, tmp_path: Path) -> None:
    """20 steps on two processes, and 4 more on one, on two with copies and on three: all read the shards of two."""
    settings = settings_of(method, small_teacher, image_folder, tmp_path / "one")
    one = distill(resolve({}, settings))
    config, two = one / "config.toml", tmp_path / "two"
    launch(2, config, two, "--gradient-accumulation-steps", "3", "--shard", "full")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)

    from lcmdistill.utils.checkpoint import load_checkpoint
    from lcmdistill.utils.run_dir import checkpoints

    whole = bytes_of(load_checkpoint(checkpoints(one / "checkpoints")[-1])[0])
    for rank in (0, 1):
        for group, size in held_bytes(two, rank).items():
            assert size == pytest.approx(whole[group] / 2, rel=0.1), (rank, group)

    distill(resolve({}, {**settings, "optim.max_train_steps": 24}))
    for count, shard in ((1, "off"), (2, "off"), (3, "full")):  # the second is DDP
        folder = shutil.copytree(two, tmp_path / f"on-{count}-{shard}")
        accumulation = ("--gradient-accumulation-steps", str(6 // count))
        launch(count, config, folder, *accumulation, "--shard", shard, "--max-train-steps", "24")
        assert losses(folder) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("method", ["lcm", "lcm-lora"])
def test_four_processes_train_as_one_and_two_do(
    method: str, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Copies and shards; a run of four continues on two, and a run of two on four."""
    settings = settings_of(method, small_teacher, image_folder, tmp_path / "one")
    settings |= {"optim.gradient_accumulation_steps": 4, "optim.max_train_steps": 10, "run.checkpoint_every": 5}
    one = distill(resolve({}, settings))
    expected, folders = losses(one), {}
    for count, shard in ((2, "off"), (4, "off"), (4, "full")):
        folders[count, shard] = folder = tmp_path / f"{count}-{shard}"
        options = ("--gradient-accumulation-steps", str(4 // count), "--shard", shard)
        launch(count, one / "config.toml", folder, *options)
        assert losses(folder) == pytest.approx(expected, rel=1e-4), (count, shard)
    distill(resolve({}, {**settings, "optim.max_train_steps": 12}))
    for written, (count, shard) in (((4, "full"), (2, "off")), ((2, "off"), (4, "full"))):
        options = ("--gradient-accumulation-steps", str(4 // count), "--shard", shard, "--max-train-steps", "12")
        launch(count, one / "config.toml", folders[written], *options)
        assert losses(folders[written]) == pytest.approx(losses(one), rel=1e-4), (written, count, shard)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_validations_sample_in_bf16(kind: str, small_teacher: Path, image_folder: Path, tmp_path: Path) -> None:
    """The gathered weights are in bf16, and a pipeline around them in fp32."""
    settings = settings_of("lcm", small_teacher, image_folder, tmp_path / "one")
    settings |= {"student.kind": kind, "run.precision": "bf16", "optim.max_train_steps": 2, "run.validate_every": 2}
    settings |= {"run.validation_prompts": ("red heart",), "student.rank": 4}
    one = distill(resolve({}, settings))
    launch(2, one / "config.toml", tmp_path / "two", "--gradient-accumulation-steps", "3", "--shard", "full")
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=0.05)
    assert (tmp_path / "two" / "samples" / "step-000002.png").is_file()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_in_one_sentence(
    rank: int, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    settings = settings_of("lcm", small_teacher, image_folder, tmp_path / "one")
    settings |= {"optim.gradient_accumulation_steps": 1, "optim.max_train_steps": 2}
    one = distill(resolve({}, settings))
    command = launch_command(2, one / "config.toml", tmp_path / "two", "--shard", "full", "--max-train-steps", "100000")
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([*command, "--set", "run.checkpoint_every=2"], cwd=ROOT, **options)
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if line.startswith("step 5/"):
            break
    else:
        pytest.fail(launcher.communicate()[1])
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    victim = next(int(pid) for pid, values in ranks.items() if f"RANK={rank}".encode() in values)
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - killed_at < 60
    assert launcher.returncode
    assert not any(Path(f"/proc/{pid}/environ").exists() for pid in children)
    messages = [line for line in errors.splitlines() if line.startswith("Error:")]
    assert len(messages) == 1
    assert "another process of this run ended" in messages[0]
    launch(2, one / "config.toml", tmp_path / "two", "--shard", "full", "--max-train-steps", "12")
