"""A student with its teacher and its target, each as a module of (z, t, c, w) under autocast.

Shapes: B batch, C latent channels, h w latent size.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcmdistill.config.schema import StudentConfig
from lcmdistill.diffusion.ema import ema_update
from lcmdistill.diffusion.types import Conditioning, RawNetwork
from lcmdistill.objectives.base import Omega
from lcmdistill.teachers.base import Teacher, has_omega_input, supports_omega_input
from lcmdistill.teachers.family import Call
from lcmdistill.teachers.lora.adapters import choose_adapter, lora_layers


class AutocastNetwork(nn.Module):
    """A network under autocast: (z, t, c, w) -> raw output (B, C, h, w) in fp32. `c` is a Conditioning's values.

    Autocast surrounds the network only, with an explicit dtype. All gradients pass through this module.
    """

    def __init__(self, network: Any, call: Call, dtype: torch.dtype) -> None:
        """Wrap a network.

        Args:
            network: A teacher's or a student's network.
            call: How the family's networks are called.
            dtype: The autocast dtype; fp32 disables autocast.
        """
        super().__init__()
        self.network = network
        self.call = call
        self.dtype = dtype

    def forward(self, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
        """Return the raw output of the network."""
        with torch.autocast(z.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.call(self.network, z, t, c, w).float()


class AdapterView(nn.Module):
    """A shared network with one of its adapters active, or none. Student, teacher and target are three such views."""

    def __init__(self, shared: AutocastNetwork, adapter: str | None, *, dropout: bool = False) -> None:
        """Take a view of a network.

        Args:
            shared: The network that all views share.
            adapter: The adapter that is active in this view; None for the bare network.
            dropout: Whether the adapter's dropout is active.
        """
        super().__init__()
        self.shared = shared
        self.adapter = adapter
        self.dropout = dropout
        self._layers = tuple(lora_layers(shared.network).values())
        # Read by DistributedDataParallel: where two adapters are trained, each view shares the gradients of its own.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.named_parameters() if p.requires_grad and f".{adapter}." not in name
        ]

    def select(self) -> None:
        """Activate this view's adapter in the shared network."""
        choose_adapter(self._layers, self.adapter, dropout=self.dropout)

    def forward(self, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
        """Return the raw output of the network with this view's adapter."""
        self.select()
        return self.shared(z, t, c, w)


def guidance_of(teacher: Teacher, config: StudentConfig, omega: Omega) -> Literal["input", "baked", "free"]:
    """Return where a student's guidance is: in an omega input, in its weights, or in CFG at sampling.

    Pixel space has no CFG.

    Args:
        teacher: The student's teacher.
        config: The [student] section.
        omega: What the objective does with omega.
    """
    if teacher.family.embeds_guidance:
        return "input"
    if omega == "none" and not teacher.in_pixels:
        return "free"
    if omega == "baked":
        return "baked"
    gets_input = config.kind == "full" and omega == "input" and supports_omega_input(teacher.network)
    return "input" if gets_input or has_omega_input(teacher.network) else "baked"


@dataclass(frozen=True)
class Student:
    """The trained network and the two frozen networks that it is trained against.

    Attributes:
        online: The network that is trained, as a module of (z, t, c, w).
        teacher: The teacher's network.
        target: The target network.
        trainable: The student's parameters.
        averaged: The target's parameters under the same names; {} if the target is the live student.
        network: The network that is sampled and exported.
        adapter: The adapter of `network` that is sampled; None for a full student.
        copies: What the target computes with on the device, where `averaged` is offloaded to the CPU.
        critic: The network that learns the distribution of the student's outputs, for methods that have one.
        critic_trainable: The critic's parameters.
    """

    online: nn.Module
    teacher: nn.Module
    target: nn.Module
    trainable: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]
    network: Any
    adapter: str | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    critic: nn.Module | None = None
    critic_trainable: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> nn.ModuleList:
        """All of its networks in one module."""
        critic = [self.critic] if self.critic is not None else []
        return nn.ModuleList([self.online, self.teacher, self.target, *critic])

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The parameters that are sampled and exported."""
        return self.averaged or self.trainable

    @torch.no_grad()
    def follow(self, mu: float) -> None:
        """Update the target's EMA, if the target is an EMA, with decay `mu`."""
        if self.averaged and not self.copies:
            ema_update(self.averaged.values(), self.trainable.values(), mu)
        for name, copied in self.copies.items():
            online, average = self.trainable[name], self.averaged[name]
            on_device = average.to(online.device)  # one at a time, with the arithmetic of a target on the device
            ema_update([on_device], [online], mu)
            average.copy_(on_device)
            copied.copy_(on_device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy `averaged` to the device again, after it was loaded."""
        for name, copied in self.copies.items():
            copied.copy_(self.averaged[name])

    @cached_property
    def has_dropout(self) -> bool:
        """Whether the trained network has active dropout."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.online.modules())

    def select_online(self) -> None:
        """Activate the trained adapter, if there is one: a backward pass that recomputes activations needs it."""
        if isinstance(self.online, AdapterView):
            self.online.select()

    def for_sampling(self) -> Any:
        """Return the network in the target's state."""
        if self.adapter is not None:
            choose_adapter(lora_layers(self.network).values(), self.adapter)
        return self.network

    def for_export(self) -> Any:
        """Return the network in the target's state, in full precision and in the memory layout of files."""
        network = self.for_sampling().to(memory_format=torch.contiguous_format)
        if not self.copies:
            return network
        device = network.device
        exported = copy.deepcopy(network.to("cpu")).float()
        network.to(device)
        exported.load_state_dict(self.averaged)
        return exported


def raw_network(module: nn.Module) -> RawNetwork:
    """Return a module that takes plain tensors as a RawNetwork, which takes a Conditioning."""

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return module(z, t, c.values, w)

    return network
