"""The full student: the teacher's U-Net with an omega input, its trainable copy and its target; and networks that run
under autocast.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.batch import Conditioning, derive_seed
from lcmdistill.consistency import OMEGA_DIM, omega_embedding


class UNetWithOmega(nn.Module):
    """The only differentiable door to a U-Net: (z, t, prompt_embeds, w) -> raw output, fp32.

    Autocast, with its dtype spelled out, is around the network and nothing else. w is embedded if the U-Net takes it.
    """

    def __init__(self, unet: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype

    def forward(self, z: Tensor, t: Tensor, prompt_embeds: Tensor, w: Tensor | None) -> Tensor:
        takes_omega = self.unet.config.time_cond_proj_dim is not None
        with torch.autocast(z.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(
                z.to(self.unet.dtype),
                t,
                encoder_hidden_states=prompt_embeds.to(self.unet.dtype),
                timestep_cond=omega_embedding(w).to(self.unet.dtype) if takes_omega and w is not None else None,
                return_dict=False,
            )
        return output[0].float()


def raw_network(module: nn.Module):
    """A module of four tensors as a RawNetwork of (z, t, c, w)."""

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return module(z, t, c.prompt_embeds, w)

    return network


def full_student(teacher_unet: Any, omega_init: str, seed: int) -> Any:
    """A trainable copy of the teacher's U-Net with `time_cond_proj_dim` set; a teacher that has it keeps its own.

    omega_init: "zero" starts exactly at the teacher; "random" is a Linear's default initialisation.
    """
    if teacher_unet.config.time_cond_proj_dim is not None:
        return copy.deepcopy(teacher_unet).float().requires_grad_(True)
    with torch.device("meta"):
        unet = type(teacher_unet).from_config({**teacher_unet.config, "time_cond_proj_dim": OMEGA_DIM})
    weights = {name: value.detach().float().clone() for name, value in teacher_unet.state_dict().items()}
    key = "time_embedding.cond_proj.weight"
    projection = torch.zeros(unet.get_parameter(key).shape)
    if omega_init == "random":
        bound = projection.shape[1] ** -0.5
        generator = torch.Generator().manual_seed(derive_seed(seed, "omega-init"))
        projection.uniform_(-bound, bound, generator=generator)
    unet.load_state_dict({**weights, key: projection}, assign=True, strict=True)
    return unet.train().requires_grad_(True)


def target_of(student_unet: Any) -> Any:
    """The target network: a frozen copy of the student."""
    return copy.deepcopy(student_unet).eval().requires_grad_(False)
