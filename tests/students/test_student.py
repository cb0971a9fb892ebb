"""The full student: it starts exactly at the teacher, takes omega, and runs in the precision that was asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.config.schema import StudentConfig
from lcmdistill.diffusion.consistency import OMEGA_DIM
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.students.build import make_student
from lcmdistill.students.full import full_student, target_of
from lcmdistill.students.student import AutocastNetwork, Student, raw_network
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.sd import call_unet
from lcmdistill.training.memory.estimate import step_memory
from tests.support.runs import resolve
from tests.support.teachers import edited

PROJECTION = "time_embedding.cond_proj.weight"


@pytest.fixture
def teacher(small_teacher: Path) -> Teacher:
    return load_teacher(str(small_teacher))


@pytest.fixture
def unet(teacher: Teacher) -> Any:
    return teacher.network


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    z, c = torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 77, 16, generator=generator)
    return z, torch.tensor([5, 500, 999])[:batch], {"prompt_embeds": c}


def test_a_teacher_whose_config_file_is_older_than_the_omega_input_gets_one(
    small_teacher: Path, tmp_path: Path
) -> None:
    """Stable Diffusion 1.5's own file does not have the key, and diffusers drops what it finds noted as absent."""

    def without(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "time_cond_proj_dim"}

    old = load_teacher(str(edited(small_teacher, tmp_path / "old", "unet/config.json", without)))
    student = full_student(old.network, "zero", 0)
    assert student.config["time_cond_proj_dim"] == OMEGA_DIM
    z, t, c = inputs()
    w = torch.full((3,), 7.0)
    assert torch.equal(old.call(student, z, t, c, w), old.call(old.network, z, t, c, None))
    config = resolve({}, {"data.resolution": 16, "teacher.model": str(small_teacher)})
    trainable = sum(p.numel() for p in student.parameters())
    assert step_memory(config, old, torch.float32).trainable == trainable


def student_of(teacher: Teacher, dtype: torch.dtype = torch.float32, **options: Any) -> Student:
    return make_student(teacher, StudentConfig(**options), dtype=dtype, seed=0, checkpointing=False)


@pytest.mark.parametrize("w", [0.0, 1.5, 14.0])
def test_a_student_of_zero_omega_is_the_teacher_bit_for_bit(teacher: Teacher, w: float) -> None:
    student, (z, t, c) = student_of(teacher), inputs()
    omega = torch.full((3,), w)
    with torch.no_grad():
        expected = student.teacher(z, t, c, None)
        assert torch.equal(student.online(z, t, c, omega), expected)
        assert torch.equal(student.target(z, t, c, omega), expected)
    assert expected.abs().max() > 0


def test_a_student_of_random_omega_starts_elsewhere_and_with_its_seed(unet: Any) -> None:
    z, t, c = inputs()
    first, again = (full_student(unet, "random", 0), full_student(unet, "random", 0))
    other = full_student(unet, "random", 1)
    assert torch.equal(first.get_parameter(PROJECTION), again.get_parameter(PROJECTION))
    assert not torch.equal(first.get_parameter(PROJECTION), other.get_parameter(PROJECTION))
    # a Linear's own initialisation: uniform up to 1 / sqrt(inputs)
    bound = OMEGA_DIM**-0.5
    assert 0.95 * bound < first.get_parameter(PROJECTION).abs().max() <= bound
    with torch.no_grad():
        module = AutocastNetwork(first, call_unet, torch.float32)
        small, large = (module(z, t, c, torch.full((3,), w)) for w in (1.0, 9.0))
        assert not torch.equal(small, large)
        assert not torch.equal(small, AutocastNetwork(unet, call_unet, torch.float32)(z, t, c, None))


def test_the_student_takes_omega_and_is_all_trainable(teacher: Teacher, unet: Any) -> None:
    student = student_of(teacher)
    assert student.network.config.time_cond_proj_dim == OMEGA_DIM
    assert set(student.trainable) == {*dict(unet.named_parameters()), PROJECTION} == set(student.averaged)
    assert all(p.requires_grad for p in student.trainable.values())
    assert not any(p.requires_grad for p in [*student.averaged.values(), *student.teacher.parameters()])
    for name, value in student.trainable.items():
        assert value.data_ptr() != student.averaged[name].data_ptr(), name
        if name != PROJECTION:
            assert value.data_ptr() != unet.get_parameter(name).data_ptr(), name


def test_gradients_reach_every_weight_and_the_omega_projection_first_of_all(teacher: Teacher) -> None:
    student, (z, t, c) = student_of(teacher), inputs()
    student.online(z, t, c, torch.full((3,), 4.0)).square().mean().backward()
    gradients = {name: value.grad for name, value in student.trainable.items()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    projection = gradients[PROJECTION]
    assert projection is not None
    assert projection.abs().max() > 0
    assert not any(p.grad is not None for p in [*student.averaged.values(), *student.teacher.parameters()])


def test_a_live_target_is_the_student_itself(teacher: Teacher) -> None:
    student = student_of(teacher, target="live")
    assert student.target is student.online
    assert student.averaged == {}
    assert dict(student.network.named_parameters()).keys() == student.trainable.keys()


def test_a_teacher_with_an_omega_input_keeps_its_projection(unet: Any) -> None:
    first = full_student(unet, "random", 0)
    second = full_student(first, "zero", 0)
    assert torch.equal(second.get_parameter(PROJECTION), first.get_parameter(PROJECTION))
    assert second.get_parameter(PROJECTION) is not first.get_parameter(PROJECTION)


def test_the_target_is_a_frozen_copy(unet: Any) -> None:
    student = full_student(unet, "zero", 0)
    target = target_of(student)
    assert student.training
    assert not target.training
    for (name, mine), (other, its) in zip(student.named_parameters(), target.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()
        assert (mine.requires_grad, its.requires_grad) == (True, False)


def dtypes_of(module: AutocastNetwork, call: Any) -> dict[str, torch.dtype]:
    """The dtype of what the first convolution and the first attention projection give."""
    seen: dict[str, torch.dtype] = {}
    layers = {"conv": module.network.conv_in, "linear": module.network.time_embedding.linear_1}
    hooks = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output.dtype))
        for name, layer in layers.items()
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_network_computes_in_the_dtype_and_returns_fp32(teacher: Teacher, dtype: torch.dtype) -> None:
    student, (z, t, c) = student_of(teacher, dtype), inputs()
    assert {p.dtype for p in student.teacher.parameters()} == {dtype}
    assert {p.dtype for p in student.online.parameters()} == {torch.float32}  # master weights
    for module in (student.teacher, student.online, student.target):
        assert isinstance(module, AutocastNetwork)
        output: list[Tensor] = []
        omega = None if module is student.teacher else torch.full((3,), 4.0)
        seen = dtypes_of(module, lambda m=module, w=omega, o=output: o.append(m(z, t, c, w)))
        assert seen == {"conv": dtype, "linear": dtype}
        assert output[0].dtype == torch.float32


def test_the_dtype_is_ours_whatever_surrounds_the_call(teacher: Teacher) -> None:
    """The trap: an autocast without a dtype, or somebody else's, decides what the teacher computes in."""
    student, (z, t, c) = student_of(teacher, torch.bfloat16), inputs()
    assert isinstance(student.teacher, AutocastNetwork)
    with torch.no_grad():
        alone = student.teacher(z, t, c, None)
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.equal(student.teacher(z, t, c, None), alone)
    full = student_of(teacher)
    with torch.no_grad():
        alone = full.teacher(z, t, c, None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(full.teacher(z, t, c, None), alone)


def test_bf16_stays_near_fp32(teacher: Teacher) -> None:
    z, t, c = inputs()
    exact = student_of(teacher)
    with torch.no_grad():
        expected = exact.online(z, t, c, torch.full((3,), 4.0))
        found = student_of(teacher, torch.bfloat16).online(z, t, c, torch.full((3,), 4.0))
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_raw_network_is_the_module_with_a_conditioning(unet: Any) -> None:
    module, (z, t, c) = AutocastNetwork(unet, call_unet, torch.float32), inputs()
    with torch.no_grad():
        assert torch.equal(raw_network(module)(z, t, Conditioning(c), None), module(z, t, c, None))
