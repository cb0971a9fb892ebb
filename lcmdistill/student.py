"""Students: a full network with an omega input, or a LoRA on the teacher's own; each with its target, under autocast."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcmdistill.batch import Conditioning, RawNetwork, derive_seed
from lcmdistill.ema import ema_update
from lcmdistill.errors import UsageError
from lcmdistill.lora import ONLINE, TARGET, adapter_parameters, add_lora, choose_adapter, lora_layers
from lcmdistill.objectives import Omega
from lcmdistill.settings import StudentConfig
from lcmdistill.teachers.base import Call, Teacher, can_take_omega, takes_omega, with_omega_input


class Door(nn.Module):
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


class WithAdapter(nn.Module):
    """A network seen with one of its adapters on, or with none: three of these share one network.

    dropout: whether the adapter's dropout acts, as it does in what is trained and nowhere else.
    """

    def __init__(self, door: Door, adapter: str | None, *, dropout: bool = False) -> None:
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
    gets_one = config.kind == "full" and omega == "input" and can_take_omega(teacher.network)
    return "input" if gets_one or takes_omega(teacher.network) else "baked"


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

    def for_drawing(self) -> Any:
        """The network as it draws: in the target's state."""
        if self.adapter is not None:
            choose_adapter(lora_layers(self.network).values(), self.adapter)
        return self.network

    def for_export(self) -> Any:
        """The network in the target's state, in all of its precision, its weights as files hold them."""
        network = self.for_drawing().to(memory_format=torch.contiguous_format)
        if not self.copies:
            return network
        device = network.device
        whole = copy.deepcopy(network.to("cpu")).float()
        network.to(device)
        whole.load_state_dict(self.averaged)
        return whole


def make_student(
    teacher: Teacher,
    config: StudentConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    omega: Omega = "input",
    same_dropout: bool = False,
) -> Student:
    """The student that the configuration asks for, on the teacher's device; the teacher's own weights go to `dtype`.

    checkpointing: recompute the student's activations in the backward pass; omega, same_dropout: as an Objective says.
    """
    if config.kind == "lora":
        return _lora(teacher, config, dtype, seed, checkpointing, same_dropout)
    return _full(teacher, config, dtype, seed, checkpointing, omega, same_dropout)


def _full(
    teacher: Teacher,
    config: StudentConfig,
    dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    omega: Omega,
    same_dropout: bool,
) -> Student:
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
    online = Door(network, teacher.call, dtype)
    return Student(
        online=online,
        teacher=Door(teacher.network.to(dtype), teacher.call, dtype),
        target=Door(target, teacher.call, dtype) if ema else online,
        trainable=dict(network.named_parameters()),
        averaged=averaged,
        network=target,
        copies=copies,
    )


def _lora(
    teacher: Teacher, config: StudentConfig, dtype: torch.dtype, seed: int, checkpointing: bool, same_dropout: bool
) -> Student:
    network = teacher.network.to(dtype).train()
    if checkpointing:
        # The backward pass recomputes with the adapter chosen last, which is the student's in every objective.
        network.enable_gradient_checkpointing()
    ema = config.target == "ema"
    for name in (TARGET, ONLINE) if ema else (ONLINE,):
        add_lora(network, name, config, seed)
    choose_adapter(lora_layers(network).values(), ONLINE)
    door = Door(network, teacher.call, dtype)
    drawing = TARGET if ema else ONLINE
    return Student(
        online=WithAdapter(door, ONLINE, dropout=True),
        teacher=WithAdapter(door, None),
        target=WithAdapter(door, drawing, dropout=same_dropout),
        trainable=adapter_parameters(network, ONLINE),
        averaged=adapter_parameters(network, TARGET) if ema else {},
        network=network,
        adapter=drawing,
    )


def raw_network(module: nn.Module) -> RawNetwork:
    """A door, which takes plain tensors, as a RawNetwork of (z, t, c, w)."""

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return module(z, t, c.values, w)

    return network


def full_student(teacher_network: Any, omega_init: str | None, seed: int) -> Any:
    """A trainable copy of the teacher's network: a U-Net with `time_cond_proj_dim` set, one of its own if it has any.

    omega_init: "zero" starts exactly at the teacher; "random" is a Linear's default initialisation; None adds no omega
    input. A network whose class has none stays without.
    """
    if omega_init is None or takes_omega(teacher_network) or not can_take_omega(teacher_network):
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
    """The target network: a frozen copy of the student."""
    return copy.deepcopy(student_network).eval().requires_grad_(False)


@torch.no_grad()
def fresh_weights(network: nn.Module, seed: int) -> None:
    """Give every layer torch's own default initialisation, each tensor drawn from the seed and its name.

    Raises UsageError for a layer whose default is not known here.
    """
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            for key, value in own.items():
                value.fill_(1.0 if key == "weight" else 0.0)
            continue
        if own and not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            raise UsageError(f"student.start is scratch, and {name} is a {type(module).__name__}; start at the teacher")
        for key, value in own.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, "scratch", name, key))
            draws = torch.empty(value.shape)
            if isinstance(module, nn.Embedding):
                draws.normal_(generator=generator)
            else:
                draws.uniform_(-1.0, 1.0, generator=generator)
                draws *= own["weight"][0].numel() ** -0.5
            value.copy_(draws)
