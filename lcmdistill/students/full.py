"""Full students: a trainable copy of the teacher network."""

import copy
from typing import Any

import torch
from torch import nn

from lcmdistill.diffusion.random import derive_seed
from lcmdistill.teachers.base import has_omega_input, supports_omega_input, with_omega_input
from lcmdistill.utils.errors import UsageError


def full_student(teacher_network: Any, omega_init: str | None, seed: int) -> Any:
    """Return a trainable copy of the teacher's network, with an omega input where its class supports one.

    Args:
        teacher_network: The teacher's network; an omega input that it has is kept as it is.
        omega_init: The input's initial weights: "zero" starts exactly at the teacher, "random" is a Linear's default; None
            adds no input.
        seed: The run's seed.
    """
    if omega_init is None or has_omega_input(teacher_network) or not supports_omega_input(teacher_network):
        return copy.deepcopy(teacher_network).float().train().requires_grad_(True)
    with torch.device("meta"):
        network = type(teacher_network).from_config(with_omega_input(teacher_network))
    weights = {name: value.detach().float().clone() for name, value in teacher_network.state_dict().items()}
    key = "time_embedding.cond_proj.weight"
    projection = torch.zeros(network.get_parameter(key).shape)
    if omega_init == "random":
        bound = projection.shape[1] ** -0.5
        generator = torch.Generator().manual_seed(derive_seed(seed, "omega-init"))
        projection.uniform_(-bound, bound, generator=generator)
    network.load_state_dict({**weights, key: projection}, assign=True, strict=True)
    return network.train().requires_grad_(True)


def target_of(student_network: Any) -> Any:
    """Return the target network: a frozen copy of the student."""
    return copy.deepcopy(student_network).eval().requires_grad_(False)


@torch.no_grad()
def fresh_weights(network: nn.Module, seed: int) -> None:
    """Initialize every layer as torch does by default, drawing each tensor from the seed and its name.

    Raises:
        UsageError: A layer's default initialization is not known here.
    """
    for name, module in network.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            for key, value in parameters.items():
                value.fill_(1.0 if key == "weight" else 0.0)
            continue
        if parameters and not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            raise UsageError(
                f"student.start is scratch, and {name} is a {type(module).__name__}, "
                "whose initialization is unknown; use teacher"
            )
        for key, value in parameters.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, "scratch", name, key))
            draws = torch.empty(value.shape)
            if isinstance(module, nn.Embedding):
                draws.normal_(generator=generator)
            else:
                draws.uniform_(-1.0, 1.0, generator=generator)
                draws *= parameters["weight"][0].numel() ** -0.5
            value.copy_(draws)
