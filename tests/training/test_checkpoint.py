"""Checkpoints are written in a thread, and hold the same whatever the memory layout."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcmdistill.teachers.single_file.load import CONFIGS
from lcmdistill.training import checkpoint
from lcmdistill.training.checkpoint import CheckpointWriter
from lcmdistill.training.compile import compile_blocks
from lcmdistill.utils.checkpoint import load_latest_checkpoint
from lcmdistill.utils.run_dir import checkpoints
from tests.support.runs import distill, resolve
from tests.support.speed import Settings, built


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.full((4, 3, 2, 2), value).to(memory_format=torch.channels_last)
    return {"student": {"conv": weight, "bias": torch.full((3,), value)}}


@pytest.mark.parametrize("left", [1e12, 0.0])
def test_a_checkpoint_holds_the_tensors_at_the_time_of_the_call(
    left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for a copy, which a thread writes, and without."""
    monkeypatch.setattr(checkpoint, "cpu_memory_left", lambda: left)
    go, write = threading.Event(), checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a, **k: (go.wait(10), write(*a, **k)))
    writer = CheckpointWriter(tmp_path, keep=1)
    if not left:
        go.set()
    for step in (1, 2):
        tensors = groups(float(step))
        writer.save(step, tensors, {})
        for value in tensors["student"].values():
            value.fill_(99.0)
        assert bool(checkpoints(tmp_path)) == (not left or step == 2)
        go.set()
    writer.wait()
    (only,) = checkpoints(tmp_path)
    assert only.name == "step-00000002"
    assert {float(v.unique()) for v in load_file(only / "student.safetensors").values()} == {2.0}


def test_a_failure_of_the_writing_thread_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, groups(1.0), {})
    with pytest.raises(OSError, match="no space"):
        writer.save(2, groups(2.0), {})
    writer.wait()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_exports_do_not_depend_on_the_memory_layout(kind: str, speed_settings: Settings) -> None:
    student = built(speed_settings, student__kind=kind).train_step.student
    student.network.to(memory_format=torch.channels_last)  # as on CUDA
    assert not all(value.is_contiguous() for value in student.network.state_dict().values())
    assert all(value.is_contiguous() for value in student.for_export().state_dict().values())


def test_moments_are_restored_in_the_layout_of_their_parameters(speed_settings: Settings) -> None:
    settings = {**speed_settings, "optim.max_train_steps": 2, "run.checkpoint_every": 2}
    folder = distill(resolve({}, settings))
    run = built(speed_settings)
    step: Any = run.train_step
    torch.nn.ModuleList([step.student.online, step.student.target]).to(memory_format=torch.channels_last)  # pyright: ignore
    checkpoint = load_latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    run.restore(checkpoint)
    for parameter, state in step.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_each_block_is_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer of one block whole, of several each of its blocks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(CONFIGS / name / "unet")
        network: Any = UNet2DConditionModel.from_config(config)
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    compile_blocks(network)
    assert {type(block).__name__ for block in compiled} == {
        "ResnetBlock2D",
        "Transformer2DModel" if name == "sd1" else "BasicTransformerBlock",
    }
    inside = [id(module) for block in compiled for module in block.modules()]
    assert len(inside) == len(set(inside))
    blocks = [m for m in network.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    assert {id(block) for block in blocks} <= set(inside)
