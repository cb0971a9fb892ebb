"""Students: a full U-Net with an omega input, or a LoRA on the teacher's own; each with its target, under autocast."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.batch import Conditioning, RawNetwork, derive_seed
from lcmdistill.consistency import OMEGA_DIM, omega_embedding
from lcmdistill.lora import ONLINE, TARGET, adapter_parameters, add_lora, choose_adapter
from lcmdistill.settings import StudentConfig


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


class WithAdapter(nn.Module):
    """A network seen with one of its adapters on, or with none: three of these share one U-Net.

    dropout: whether the adapter's dropout acts, as it does in what is trained and nowhere else.
    """

    def __init__(self, network: UNetWithOmega, adapter: str | None, *, dropout: bool = False) -> None:
        super().__init__()
        self.network = network
        self.adapter = adapter
        self.dropout = dropout

    def forward(self, z: Tensor, t: Tensor, prompt_embeds: Tensor, w: Tensor | None) -> Tensor:
        choose_adapter(self.network.unet, self.adapter, dropout=self.dropout)
        return self.network(z, t, prompt_embeds, w)


@dataclass(frozen=True)
class Student:
    """What is trained, and the two frozen networks that it is trained against.

    online, teacher, target: modules of (z, t, prompt_embeds, w); trainable, averaged: the student's parameters and the
    target's, under the same names (none where the target is the live student); unet: what draws and is exported.
    """

    online: nn.Module
    teacher: nn.Module
    target: nn.Module
    trainable: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]
    unet: Any
    adapter: str | None = None
    "the adapter that `unet` draws with, if it has any"

    def for_drawing(self) -> Any:
        """The U-Net as it draws: in the target's state."""
        if self.adapter is not None:
            choose_adapter(self.unet, self.adapter)
        return self.unet


def make_student(
    teacher_unet: Any, config: StudentConfig, *, dtype: torch.dtype, seed: int, checkpointing: bool
) -> Student:
    """The student that the configuration asks for, on the teacher's device; the teacher's own weights go to `dtype`.

    checkpointing: recompute the student's activations in the backward pass.
    """
    make = _lora if config.kind == "lora" else _full
    return make(teacher_unet, config, dtype, seed, checkpointing)


def _full(teacher_unet: Any, config: StudentConfig, dtype: torch.dtype, seed: int, checkpointing: bool) -> Student:
    unet = full_student(teacher_unet, config.omega_init, seed).to(teacher_unet.device)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    ema = config.target == "ema"
    target = target_of(unet) if ema else unet
    online = UNetWithOmega(unet, dtype)
    return Student(
        online=online,
        teacher=UNetWithOmega(teacher_unet.to(dtype), dtype),
        target=UNetWithOmega(target, dtype) if ema else online,
        trainable=dict(unet.named_parameters()),
        averaged=dict(target.named_parameters()) if ema else {},
        unet=target,
    )


def _lora(teacher_unet: Any, config: StudentConfig, dtype: torch.dtype, seed: int, checkpointing: bool) -> Student:
    unet = teacher_unet.to(dtype).train()
    if checkpointing:
        # The backward pass recomputes with the adapter chosen last, which is the student's in every objective.
        unet.enable_gradient_checkpointing()
    ema = config.target == "ema"
    for name in (TARGET, ONLINE) if ema else (ONLINE,):
        add_lora(unet, name, config, seed)
    choose_adapter(unet, ONLINE)
    network = UNetWithOmega(unet, dtype)
    drawing = TARGET if ema else ONLINE
    return Student(
        online=WithAdapter(network, ONLINE, dropout=True),
        teacher=WithAdapter(network, None),
        target=WithAdapter(network, drawing),
        trainable=adapter_parameters(unet, ONLINE),
        averaged=adapter_parameters(unet, TARGET) if ema else {},
        unet=unet,
        adapter=drawing,
    )


def raw_network(module: nn.Module) -> RawNetwork:
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
