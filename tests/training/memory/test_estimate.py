"""The estimate against the storages of a real step."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcmdistill.config.schema import RunConfig
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.students.student import Student
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.distributed import make_accelerator
from lcmdistill.training.memory.estimate import Breakdown, Live, optimizer_bytes, step_memory
from lcmdistill.training.trainer import make_trainer
from tests.support.memory import configured

Latents: Any = runpy.run_path(str(Path(__file__).parent.parent.parent.parent / "examples" / "memory.py"))["Latents"]
"the example's data set of one sample, of a teacher's own shapes"


def held(student: Student) -> list[Tensor]:
    modules = nn.ModuleList([student.online, student.teacher, student.target])
    return [*modules.parameters(), *modules.buffers()]


def real_step(config: RunConfig, teacher: Teacher, tmp_path: Path, norms_in_fp32: bool = False) -> tuple[Any, int]:
    """A run, and the most bytes of storages that its second step had at once, the optimiser's aside."""
    data: Any = Latents(teacher, config.data.resolution)
    planned_run = make_trainer(config, tmp_path, make_accelerator(config), teacher, data)
    step: Any = planned_run.train_step
    if norms_in_fp32:
        for module in nn.ModuleList([step.student.online, step.student.teacher, step.student.target]).modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.float().register_forward_pre_hook(lambda module, inputs: tuple(x.float() for x in inputs))
    live = Live()
    live.hold(held(step.student))
    with live:
        steps = planned_run.steps()
        next(steps)
        live.peak = 0
        next(steps)
    moments = [v for values in step.optimizer.state_dict()["state"].values() for v in values.values()]
    return step, live.peak - sum(v.untyped_storage().nbytes() for v in moments)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_estimate_is_what_a_real_step_holds(
    kind: str, checkpointing: bool, accumulate: int, small_teacher: Path, tmp_path: Path
) -> None:
    own = {"student__kind": kind, "optim__gradient_accumulation_steps": accumulate}
    config = configured(small_teacher, run__gradient_checkpointing=checkpointing, **own)
    teacher = load_teacher(str(small_teacher))
    needed = step_memory(config, teacher, torch.float32)
    step, peak = real_step(config, teacher, tmp_path)
    assert needed.total - needed.optimizer == pytest.approx(peak, rel=0.02)
    trained = list(step.student.trainable.values())
    assert needed.trainable == sum(p.numel() for p in trained)
    assert needed.student == needed.gradients == sum(p.untyped_storage().nbytes() for p in trained)
    assert needed.optimizer == sum(
        v.untyped_storage().nbytes()
        for values in step.optimizer.state_dict()["state"].values()
        for name, v in values.items()
        if name != "step"
    )
    everything = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(step.student)}
    assert needed.frozen + needed.student + needed.target == pytest.approx(sum(everything.values()), rel=0.02)


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_in_half_precision_it_is_the_step_under_autocast_with_cuda_s_norms(
    kind: str, small_teacher: Path, tmp_path: Path
) -> None:
    config = configured(small_teacher, student__kind=kind, run__precision="bf16")
    teacher = load_teacher(str(small_teacher))
    needed = step_memory(config, teacher, torch.bfloat16)
    _, peak = real_step(config, teacher, tmp_path, norms_in_fp32=True)
    assert needed.total - needed.optimizer == pytest.approx(peak, rel=0.05)


def test_the_activations_are_what_autograd_saves(small_teacher: Path) -> None:
    """Counted in another way: by the hooks on saved tensors, of one real forward of the student."""
    config = configured(small_teacher, data__resolution=64, student__target="live")
    teacher = load_teacher(str(small_teacher))
    needed = step_memory(config, teacher, torch.float32)
    network = teacher.network.requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    z, t, c = teacher.example(config.optim.batch_size, 64, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        teacher.call(network, z, t, c.values, None)
    size = sum(v.untyped_storage().nbytes() for place, v in saved.items() if place not in weights)
    assert needed.activations + needed.gradients == pytest.approx(size, rel=0.1)


def test_the_estimate_follows_the_settings(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))

    def of(dtype: torch.dtype = torch.float32, **changes: Any) -> Breakdown:
        return step_memory(configured(small_teacher, **changes), teacher, dtype)

    plain = of()
    assert of(run__gradient_checkpointing=True).activations < 0.7 * plain.activations
    assert of(optim__batch_size=8).activations == pytest.approx(2 * plain.activations, rel=0.1)
    assert of(optim__gradient_accumulation_steps=3).total >= plain.total
    assert of(student__target="live").target == 0
    assert of(torch.bfloat16).frozen == pytest.approx(plain.frozen / 2, rel=0.1)
    assert of(torch.bfloat16).activations < plain.activations
    away = of(torch.bfloat16, student__offload_target=True)
    assert away.target == plain.target // 2
    eight = of(optim__optimizer="adamw8bit").optimizer
    assert eight == pytest.approx(plain.optimizer / 4, rel=0.03)
    assert optimizer_bytes("adamw8bit", 256) == 2 * (256 + 4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_can_be_estimated(objective: str, small_teacher: Path) -> None:
    config = configured(small_teacher, objective__name=objective)
    assert step_memory(config, load_teacher(str(small_teacher)), torch.bfloat16).activations > 0


def test_storages_are_counted_while_they_live() -> None:
    live = Live()
    weight = torch.zeros(100)
    assert live.hold([weight, weight[:5]]) == 400
    with live:
        one = torch.zeros(50)
        assert live.now == 600
        view = one.view(5, 10)
        del one
        assert live.now == 600
        del view
        assert live.now == 400
    assert live.peak == 600


def test_outputs_of_a_repeated_operation_are_new_tensors() -> None:
    x, live = torch.empty(2, 4, 8, 8, device="meta"), Live()

    def once(x: Tensor) -> list[Tensor]:
        low, high = torch.var_mean(x, (2, 3))
        return [x.half() @ x.half().mT, low, high, x.to(memory_format=torch.channels_last), x.mT, x.add_(1)]

    with live:
        first, held = once(x), live.now
        again = once(x)
    assert [(y.shape, y.stride(), y.dtype) for y in first] == [(y.shape, y.stride(), y.dtype) for y in again]
    storages = [y.untyped_storage()._cdata for y in (*first, *again)]
    # The transposed x and the x that was added to are x itself, each time; all else is new.
    own = x.untyped_storage()._cdata
    assert [key == own for key in storages] == 2 * [False, False, False, False, True, True]
    assert len(set(storages)) == 9
    assert live.now == 2 * held - x.untyped_storage().nbytes()
