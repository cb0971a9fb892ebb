"""Build the student that a configuration asks for."""

import dataclasses

import torch

from lcmdistill.config.schema import StudentConfig
from lcmdistill.objectives.base import CriticOptions, Omega
from lcmdistill.students.critic import add_critic_adapter, full_critic
from lcmdistill.students.full import fresh_weights, full_student, target_of
from lcmdistill.students.lora import CRITIC, ONLINE, TARGET, add_lora
from lcmdistill.students.quantize import quantize_base
from lcmdistill.students.student import AdapterView, AutocastNetwork, Student
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.lora.adapters import adapter_parameters, choose_adapter, lora_layers


def make_student(
    teacher: Teacher,
    config: StudentConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    omega: Omega = "input",
    same_dropout: bool = False,
    critic: CriticOptions | None = None,
) -> Student:
    """Build the configured student on the teacher's device. The teacher's own weights are cast to `dtype`.

    Args:
        teacher: The teacher.
        config: The [student] section.
        dtype: The autocast dtype of the networks.
        seed: The run's seed, for initial weights.
        checkpointing: Whether to recompute the student's activations in the backward pass.
        omega: What the objective does with omega.
        same_dropout: Whether the target has the student's dropout.
        critic: The critic, for methods that have one.
    """
    if config.kind == "lora":
        return _lora_student(teacher, config, dtype, seed, checkpointing, same_dropout, critic)
    # Before the teacher's weights are cast.
    network = full_critic(teacher, dtype, checkpointing=checkpointing) if critic is not None else None
    student = _full_student(teacher, config, dtype, seed, checkpointing, omega, same_dropout)
    if network is None:
        return student
    return dataclasses.replace(student, critic=network, critic_trainable=dict(network.network.named_parameters()))


def _full_student(
    teacher: Teacher,
    config: StudentConfig,
    dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    omega: Omega,
    same_dropout: bool,
) -> Student:
    """Build a trainable copy of the teacher's network, and its EMA if the target is one."""
    add_omega = config.omega_init if omega == "input" else None
    network = full_student(teacher.network, add_omega, seed).to(teacher.network.device)
    if config.start == "scratch":
        fresh_weights(network, seed)
    if checkpointing:
        network.enable_gradient_checkpointing()
    ema = config.target == "ema"
    target = target_of(network).train(same_dropout) if ema else network
    averaged, copies = dict(target.named_parameters()) if ema else {}, {}
    if ema and config.offload_target:
        pinned = network.device.type == "cuda"
        averaged = {name: torch.empty_like(v, device="cpu", pin_memory=pinned).copy_(v) for name, v in averaged.items()}
        copies = dict(target.to(dtype).named_parameters())
    online = AutocastNetwork(network, teacher.call, dtype)
    return Student(
        online=online,
        teacher=AutocastNetwork(teacher.network.to(dtype), teacher.call, dtype),
        target=AutocastNetwork(target, teacher.call, dtype) if ema else online,
        trainable=dict(network.named_parameters()),
        averaged=averaged,
        network=target,
        copies=copies,
    )


def _lora_student(
    teacher: Teacher,
    config: StudentConfig,
    dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    same_dropout: bool,
    critic: CriticOptions | None,
) -> Student:
    """Add adapters to the teacher's network; student, teacher, target and critic are views of that network."""
    network = teacher.network.to(dtype).train()
    if checkpointing:
        # The backward pass recomputes with the adapter selected last: the one whose loss it is, or see `select_online`.
        network.enable_gradient_checkpointing()
    ema = config.target == "ema"
    for name in (TARGET, ONLINE) if ema else (ONLINE,):
        add_lora(network, name, config, seed)
    if critic is not None:
        add_critic_adapter(network, config, critic, seed)
    choose_adapter(lora_layers(network).values(), ONLINE)
    quantize_base(network, config.quantize_base)  # after peft has seen plain layers
    shared = AutocastNetwork(network, teacher.call, dtype)
    sampled = TARGET if ema else ONLINE
    return Student(
        online=AdapterView(shared, ONLINE, dropout=True),
        teacher=AdapterView(shared, None),
        target=AdapterView(shared, sampled, dropout=same_dropout),
        trainable=adapter_parameters(network, ONLINE),
        averaged=adapter_parameters(network, TARGET) if ema else {},
        network=network,
        adapter=sampled,
        critic=AdapterView(shared, CRITIC) if critic is not None else None,
        critic_trainable=adapter_parameters(network, CRITIC) if critic is not None else {},
    )
