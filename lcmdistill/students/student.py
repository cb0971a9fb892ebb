"""Students: a full network with an omega input, or a LoRA on the teacher's own; each with its target, under autocast."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcmdistill.config.schema import StudentConfig
from lcmdistill.diffusion.ema import ema_update
from lcmdistill.diffusion.types import Conditioning, RawNetwork
from lcmdistill.objectives.base import Omega
from lcmdistill.students.lora import choose_adapter, lora_layers
from lcmdistill.teachers.base import Teacher, has_omega_input, supports_omega_input
from lcmdistill.teachers.family import Call


class AutocastNetwork(nn.Module):
    """The only differentiable door to a network: (z, t, c, w) -> raw output, fp32; c: a Conditioning's values.

    Autocast, with its dtype spelled out, is around the network and nothing else. call: the family's own, see Teacher.
    """

    def __init__(self, network: Any, call: Call, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.call = call
        self.dtype = dtype

    def forward(self, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
        with torch.autocast(z.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.call(self.network, z, t, c, w).float()


class AdapterView(nn.Module):
    """A network seen with one of its adapters on, or with none: three of these share one network.

    dropout: whether the adapter's dropout acts, as it does in what is trained and nowhere else.
    """

    def __init__(self, door: AutocastNetwork, adapter: str | None, *, dropout: bool = False) -> None:
        super().__init__()
        self.door = door
        self.adapter = adapter
        self.dropout = dropout
        self._layers = tuple(lora_layers(door.network).values())

    def forward(self, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
        choose_adapter(self._layers, self.adapter, dropout=self.dropout)
        return self.door(z, t, c, w)


def guidance_of(teacher: Teacher, config: StudentConfig, omega: Omega) -> Literal["input", "baked", "free"]:
    """Where a student's guidance is: in an omega input, in its weights, or still in CFG at sampling, of which pixel space has
    none."""
    if omega == "none" and not teacher.in_pixels:
        return "free"
    gets_one = config.kind == "full" and omega == "input" and supports_omega_input(teacher.network)
    return "input" if gets_one or has_omega_input(teacher.network) else "baked"


@dataclass(frozen=True)
class Student:
    """What is trained, and the two frozen networks that it is trained against.

    online, teacher, target: modules of (z, t, c, w), as Door; trainable, averaged: the student's parameters and the
    target's, under the same names (none where the target is the live student); network: what draws and is exported; copies:
    where `averaged` rests on the CPU, what the target computes with on the device.
    """

    online: nn.Module
    teacher: nn.Module
    target: nn.Module
    trainable: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]
    network: Any
    adapter: str | None = None
    "the adapter that `network` draws with, if it has any"
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def follow(self, mu: float) -> None:
        """Let the target follow the student: `ema_update`, if it is an average at all."""
        if self.averaged and not self.copies:
            ema_update(self.averaged.values(), self.trainable.values(), mu)
        for name, copied in self.copies.items():
            online, average = self.trainable[name], self.averaged[name]
            here = average.to(online.device)  # one at a time, by the arithmetic of a target that was never moved
            ema_update([here], [online], mu)
            average.copy_(here)
            copied.copy_(here)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies equal to what they are copies of."""
        for name, copied in self.copies.items():
            copied.copy_(self.averaged[name])

    @property
    def has_dropout(self) -> bool:
        """Whether what is trained has dropout that acts."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.online.modules())

    def for_sampling(self) -> Any:
        """The network as it draws: in the target's state."""
        if self.adapter is not None:
            choose_adapter(lora_layers(self.network).values(), self.adapter)
        return self.network

    def for_export(self) -> Any:
        """The network in the target's state, in all of its precision, its weights as files hold them."""
        network = self.for_sampling().to(memory_format=torch.contiguous_format)
        if not self.copies:
            return network
        device = network.device
        whole = copy.deepcopy(network.to("cpu")).float()
        network.to(device)
        whole.load_state_dict(self.averaged)
        return whole


def raw_network(module: nn.Module) -> RawNetwork:
    """A door, which takes plain tensors, as a RawNetwork of (z, t, c, w)."""

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return module(z, t, c.values, w)

    return network
