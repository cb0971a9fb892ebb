"""The critic of distribution matching: a second trained network that starts at the teacher, full or as an adapter."""

import dataclasses
from typing import Any

import torch

from lcmdistill.config.schema import StudentConfig
from lcmdistill.objectives.base import CriticOptions
from lcmdistill.students.full import full_student
from lcmdistill.students.lora import CRITIC, ONLINE, add_lora
from lcmdistill.students.student import AutocastNetwork
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.lora.adapters import adapter_parameters


def full_critic(teacher: Teacher, dtype: torch.dtype, *, checkpointing: bool) -> AutocastNetwork:
    """Return the critic of a full student: a trainable copy of the teacher's network.

    Args:
        teacher: The teacher, with its weights as they were loaded.
        dtype: The autocast dtype of the networks.
        checkpointing: Whether to recompute the critic's activations in the backward pass.
    """
    network = full_student(teacher.network, None, 0).to(teacher.network.device)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return AutocastNetwork(network, teacher.call, dtype)


def add_critic_adapter(network: Any, config: StudentConfig, critic: CriticOptions, seed: int) -> None:
    """Add the critic's adapter next to the student's, which stays trainable.

    Args:
        network: The teacher's network with the student's adapter.
        config: The [student] section.
        critic: The critic's rank. The scale alpha / r is the student's.
        seed: The run's seed, for the initial weights.

    Raises:
        UsageError: The rank exceeds a layer's width.
    """
    rank = critic.rank or config.rank
    # Without dropout: the critic's loss is a regression on noisy samples, which regularizes enough.
    own = dataclasses.replace(config, rank=rank, alpha=config.alpha * rank / config.rank, dropout=0.0)
    add_lora(network, CRITIC, own, seed)
    for parameter in adapter_parameters(network, ONLINE).values():
        parameter.requires_grad_(True)
