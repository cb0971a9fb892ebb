"""What a training step holds on its device: the step itself, made on the meta device, with every storage counted.

Nothing here is a table: the networks are the teacher's own classes at its own shapes, the objective is the configured one, and
autograd saves what it saves. Left out is what a kernel takes for itself (cuDNN's and cuBLAS's workspaces), and how an
allocator breaks memory into pieces: see `usable`.
"""

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.buckets import largest
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, TeacherNetwork, x0_eps_network
from lcmdistill.students.build import make_student
from lcmdistill.students.student import AutocastNetwork, Student, raw_network
from lcmdistill.teachers.base import Teacher, has_omega_input, supports_omega_input, with_omega_input

GIB = 2**30

CONTEXT = 0.6 * GIB
"what CUDA itself takes of a card before the first tensor"

SLACK = 1.1
"for workspaces and the allocator's broken pieces"

_KNOWN: dict[Any, list[tuple[Any, ...]]] = {}
"an operation and its inputs on the meta device -> (shape, strides, dtype) of each tensor that it gives"


@dataclass(frozen=True)
class Breakdown:
    """Bytes on the device at the peak of a step. base, trainable: parameters of the teacher, and of what is trained."""

    base: int
    trainable: int
    frozen: int
    "the teacher's weights, or those that a LoRA sits on"
    student: int
    target: int
    "the EMA target, as far as it lies on the device"
    gradients: int
    optimizer: int
    activations: int
    "what the peak holds beyond all these"

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.frozen + self.student + self.target + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("frozen weights", self.frozen), ("student", self.student), ("EMA target", self.target)
        parts += ("gradients", self.gradients), ("optimizer", self.optimizer), ("activations", self.activations)
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)


def usable(limit: float, *, whole_card: bool) -> float:
    """How many bytes of tensors fit in `limit` bytes: of a whole card, or of what is free of one that is in use."""
    return (limit - CONTEXT if whole_card else limit) / SLACK


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, for as long as it lives. `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count storages that are there already, for good; returns their bytes."""
        before = self.now
        for tensor in tensors:
            self._count(tensor, forever=True)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._repeated(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    @staticmethod
    def _repeated(func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives: of inputs such as it had before, new tensors such as it gave then.

        Without data it can be nothing else, and most of an operation's time on the meta device goes into finding that out.
        """
        key = func, _described(args), _described(tuple(kwargs.items()))
        shapes = _KNOWN.get(key)
        if shapes is not None:
            made = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in shapes]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        own = (out,) if isinstance(out, Tensor) else out
        if _makes_new(func) and isinstance(own, tuple) and all(isinstance(x, Tensor) and x.is_meta for x in own):
            _KNOWN[key] = [(x.shape, x.stride(), x.dtype) for x in own]
        return out

    def _count(self, tensor: Tensor, *, forever: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        if not forever:
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@cache
def _makes_new(func: Any) -> bool:
    """Whether all that an operation gives is new: neither a view of its inputs nor one of them."""
    schema = func._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


def _described(x: Any) -> Any:
    """All that the meta device knows of an operation's inputs, to look it up by."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device.type
    if isinstance(x, list | tuple):
        return tuple(map(_described, x))
    return type(x), x


def step_memory(config: RunConfig, teacher: Teacher, dtype: torch.dtype, *, world: int = 1) -> Breakdown:
    """The memory of one micro-batch of an optimiser step on one of `world` devices, computing in `dtype`.

    Raises UsageError for a LoRA that the teacher cannot have.
    """
    z, _, c = teacher.example(config.optim.batch_size, largest(config.data, teacher.multiple), "meta")
    null, schedule = teacher.encode_prompts([""]).to("meta"), teacher.schedule.to("meta")
    student = _student(config, teacher, dtype)
    # A teacher that was asked beforehand is not there, unless its weights are those that a LoRA sits on.
    answered = config.data.teacher_cache_samples > 0
    beside = [] if answered and config.student.kind == "full" else [student.teacher]
    modules = nn.ModuleList([student.online, *beside, student.target])
    trained, live = list(student.trainable.values()), Live()
    sizes = {"student": live.hold(trained), "target": live.hold(student.averaged.values())}
    sizes["frozen"] = live.hold([*modules.parameters(), *modules.buffers()])
    doors = [raw_network(module) for module in (student.teacher, student.online, student.target)]
    of_teacher, of_student, of_target = (x0_eps_network(door, schedule, teacher.prediction_type) for door in doors)
    if answered:
        of_teacher = x0_eps_network(lambda z, t, c, w: torch.zeros_like(z), schedule, teacher.prediction_type)
    objective = config.objective
    if getattr(objective, "lpips_weights", None):  # its network is small beside the others
        objective = dataclasses.replace(objective, distance="l2", lpips_weights=None)
    with live, _fused_attention():
        if (
            config.optim.gradient_accumulation_steps > 1 or world > 1
        ):  # gradients that are there before the backward pass
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        rng = Rng(0, 0, range(len(z)), "meta")
        batch = Batch(torch.zeros_like(z), c)
        with torch.no_grad():
            state = objective.teacher_step(TeacherNetwork(of_teacher, null), schedule, batch, rng)
        objective.loss(of_student, of_target, schedule, batch, state).mean().backward()
    count = sum(p.numel() for p in trained)
    activations = live.peak - sum(sizes.values()) - 4 * count
    if config.student.offload_target and config.student.kind == "full":
        sizes["target"] = sizes["target"] * dtype.itemsize // 4
    return Breakdown(
        base=sum(p.numel() for p in teacher.network.parameters()),
        trainable=count,
        **sizes,
        gradients=4 * count,
        optimizer=optimizer_bytes(config.optim.optimizer, count),
        activations=activations,
    )


def _student(config: RunConfig, teacher: Teacher, dtype: torch.dtype) -> Student:
    """The student without data, and all that it is trained against, computing as under autocast to `dtype`."""
    shape: Mapping[str, Any] = teacher.network.config
    adds_omega = config.student.kind == "full" and config.objective.omega == "input"
    if adds_omega and supports_omega_input(teacher.network) and not has_omega_input(teacher.network):
        shape = with_omega_input(teacher.network)
    with torch.device("meta"):
        network = type(teacher.network).from_config(shape).eval().requires_grad_(False)
        student = make_student(
            dataclasses.replace(teacher, network=network),
            dataclasses.replace(config.student, offload_target=False, start="teacher"),
            dtype=dtype,
            seed=0,
            checkpointing=config.run.gradient_checkpointing,
            omega=config.objective.omega,
            same_dropout=config.objective.same_dropout,
        )
    for door in nn.ModuleList([student.online, student.teacher, student.target]).modules():
        if isinstance(door, AutocastNetwork):
            door.forward = partial(_open, door)
            if dtype != torch.float32:
                _as_under_autocast(door.network, dtype)
    return student


def _open(door: AutocastNetwork, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """A door without its autocast, which the meta device has not."""
    return door.call(door.network, z, t, c, w).float()


def _as_under_autocast(network: nn.Module, dtype: torch.dtype) -> None:
    """What CUDA's autocast does to what networks are made of: products in `dtype`, norms in fp32."""

    def cast(module: Any, forward: Any, wanted: torch.dtype, x: Tensor) -> Tensor:
        kept = dict(module._parameters)
        module._parameters.update({name: p.to(wanted) for name, p in kept.items() if p is not None})
        try:
            return forward(x.to(wanted))
        finally:
            module._parameters.update(kept)

    modules: list[Any] = list(network.modules())
    for module in modules:
        is_product, is_norm = (
            isinstance(module, kind) for kind in (nn.Linear | nn.Conv2d, nn.GroupNorm | nn.LayerNorm)
        )
        if is_product or is_norm:
            module.forward = partial(cast, module, module.forward, dtype if is_product else torch.float32)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as on a CPU or a GPU, where its matrix is never whole; the meta device would make it."""

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)[0]

    usual = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def optimizer_bytes(name: str, count: int) -> int:
    """The bytes of an optimiser's two moments of `count` numbers: fp32, or eight bits with a scale for each 256."""
    return 8 * count if name == "adamw" else 2 * (count + 4 * -(-count // 256))
