"""The memory of a training step: the step itself runs on the meta device, and every storage is counted.

Nothing here is a table: the networks are the teacher's classes in its shapes, the objective is the configured one, and autograd
saves what it always saves. Not counted are the workspaces of kernels (cuDNN, cuBLAS) and the allocator's fragmentation: see
`usable`.
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

from lcmdistill.config.schema import RunConfig, Shard
from lcmdistill.data.buckets import largest
from lcmdistill.data.trajectories import TrajectoryPlan
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.trajectory import Trajectory
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork, x0_eps_network
from lcmdistill.students.build import make_student
from lcmdistill.students.quantize import largest_decoded, saved_bytes
from lcmdistill.students.student import AutocastNetwork, Student, raw_network
from lcmdistill.teachers.base import Teacher, has_omega_input, supports_omega_input, with_omega_input
from lcmdistill.training.compile import repeated_blocks
from lcmdistill.training.step_kinds import STEP_KINDS
from lcmdistill.training.train_step import StepNetworks
from lcmdistill.utils.device import GIB

CONTEXT = 0.6 * GIB
"memory of a GPU that CUDA itself takes before the first tensor"

SLACK = 1.1
"factor for workspaces and fragmentation"

_OUTPUTS: dict[Any, list[tuple[Any, ...]]] = {}
"an operation and its inputs on the meta device -> (shape, strides, dtype) of each output"


@dataclass(frozen=True)
class Breakdown:
    """Bytes on the device at the peak of a step.

    Attributes:
        base: Number of parameters of the teacher.
        trainable: Number of the student's trained parameters.
        frozen: The teacher's weights, or the weights under a LoRA.
        student: The trained weights.
        target: The part of the EMA target that is on the device.
        gradients: The gradients of the trained weights.
        optimizer: The optimizer's moments.
        activations: Everything else at the peak.
        critic: The critic's weights, of methods that have one.
        encoders: VAE and text encoders, where samples are encoded while the run trains.
        shards: The number of processes that the weights, and what belongs to them, are divided over.
    """

    base: int
    trainable: int
    frozen: int
    student: int
    target: int
    gradients: int
    optimizer: int
    activations: int
    critic: int = 0
    encoders: int = 0
    shards: int = 1

    @property
    def total(self) -> int:
        """The bytes at the peak."""
        weights = self.frozen + self.student + self.critic + self.target + self.encoders
        return weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("frozen weights", self.frozen), ("student", self.student), ("critic", self.critic)
        parts += ("EMA target", self.target), ("encoders", self.encoders)
        parts += ("gradients", self.gradients), ("optimizer", self.optimizer), ("activations", self.activations)
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)


def usable(limit: float, *, whole_gpu: bool) -> float:
    """Return how many bytes of tensors fit in `limit` bytes: of a whole GPU, or of the free memory of one in use."""
    return (limit - CONTEXT if whole_gpu else limit) / SLACK


class Live(TorchDispatchMode):
    """Count the bytes of every storage that an operation creates, for as long as it lives. `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count existing storages permanently, and return their bytes."""
        before = self.now
        for tensor in tensors:
            self._count(tensor, forever=True)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    @staticmethod
    def _run(func: Any, args: Any, kwargs: Any) -> Any:
        """Return the outputs of an operation; for inputs like earlier ones, new tensors like the earlier outputs.

        Without data the outputs depend on nothing else, and to derive their shapes takes most of the time on the meta device.
        """
        key = func, _signature(args), _signature(tuple(kwargs.items()))
        shapes = _OUTPUTS.get(key)
        if shapes is not None:
            tensors = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in shapes]
            return tensors[0] if len(tensors) == 1 else tuple(tensors)
        out = func(*args, **kwargs)
        outputs = (out,) if isinstance(out, Tensor) else out
        if (
            _allocates(func)
            and isinstance(outputs, tuple)
            and all(isinstance(x, Tensor) and x.is_meta for x in outputs)
        ):
            _OUTPUTS[key] = [(x.shape, x.stride(), x.dtype) for x in outputs]
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
def _allocates(func: Any) -> bool:
    """Return whether all outputs of an operation are new: neither its inputs nor views of them."""
    schema = func._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


def _signature(x: Any) -> Any:
    """Return everything that the outputs on the meta device depend on, as a key."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device.type
    if isinstance(x, list | tuple):
        return tuple(map(_signature, x))
    return type(x), x


def step_memory(config: RunConfig, teacher: Teacher, dtype: torch.dtype, *, world: int = 1) -> Breakdown:
    """Return the memory of one micro-batch of an optimizer step.

    Args:
        config: The configuration of the run.
        teacher: The teacher; its weights are not used.
        dtype: The dtype inside the networks.
        world: Number of processes.

    Raises:
        UsageError: The configuration asks for a LoRA that the teacher cannot have.
    """
    z, _, c = teacher.example(config.optim.batch_size, largest(config.data, teacher.multiple), "meta")
    null, schedule = teacher.encode_prompts([""]).to("meta"), teacher.schedule.to("meta")
    student = _student(config, teacher, dtype)
    # With cached outputs the teacher is not on the device, unless a LoRA is on its weights.
    is_cached = config.data.teacher_cache_samples > 0
    teacher_network = [] if is_cached and config.student.kind == "full" else [student.teacher]
    critic = [student.critic] if student.critic is not None else []
    modules = nn.ModuleList([student.online, *teacher_network, student.target, *critic])
    trained, of_critic = list(student.trainable.values()), list(student.critic_trainable.values())
    live = Live()
    sizes = {"student": live.hold(trained), "critic": live.hold(of_critic)}
    sizes["target"] = live.hold(student.averaged.values())
    sizes["frozen"] = live.hold([*modules.parameters(), *modules.buffers()])

    def network(module: nn.Module) -> Network:
        return x0_eps_network(raw_network(module), schedule, teacher.prediction_type)

    of_teacher = network(student.teacher)
    if is_cached:
        of_teacher = x0_eps_network(lambda z, t, c, w: torch.zeros_like(z), schedule, teacher.prediction_type)
    networks = StepNetworks(
        teacher=TeacherNetwork(of_teacher, null, teacher.applies_cfg),
        student=network(student.online),
        target=network(student.target),
        critic=network(student.critic) if student.critic is not None else None,
    )
    objective = config.objective
    if getattr(objective, "lpips_weights", None):  # its network is small compared with the others
        objective = dataclasses.replace(objective, distance="l2", lpips_weights=None)
    accumulates = config.optim.gradient_accumulation_steps > 1 or world > 1

    def before_backward(parameters: Iterable[Tensor]) -> None:
        for parameter in parameters if accumulates else ():  # gradients that are there before the backward pass
            parameter.grad = torch.zeros_like(parameter)

    with live, _fused_attention():
        rng, batch = Rng(0, 0, range(len(z)), "meta"), Batch(torch.zeros_like(z), c, _trajectory(config, z))
        rehearse = STEP_KINDS[objective.info.train_step].rehearse
        rehearse(objective, student, networks, schedule, batch, rng, before_backward)
    count, critic_count = (sum(p.numel() for p in parameters) for parameters in (trained, of_critic))
    gradients = 4 * max(count, critic_count)  # those of one are gone before the other's backward pass
    activations = live.peak - sum(sizes.values()) - gradients
    if config.student.offload_target and config.student.kind == "full":
        sizes["target"] = sizes["target"] * dtype.itemsize // 4
    memory = Breakdown(
        base=sum(p.numel() for p in teacher.network.parameters()),
        trainable=count,
        **sizes,
        gradients=gradients,
        optimizer=optimizer_bytes(config.optim.optimizer, count + critic_count),
        activations=activations,
        encoders=_bytes(teacher.encoders) if config.data.cache == "off" else 0,
    )
    memory = in_shards(memory, config, teacher, dtype, world) if is_sharded(config, world) else memory
    return quantized(memory, config, teacher, dtype)


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _trajectory(config: RunConfig, z: Tensor) -> Trajectory | None:
    """Return the trajectories of a micro-batch, where its samples have them."""
    plan = TrajectoryPlan.of(config)
    if plan is None:
        return None
    states = torch.zeros(len(z), plan.points, *z.shape[1:], device=z.device)
    return Trajectory(states, None if plan.omega is None else torch.zeros(len(z), device=z.device))


def quantized(memory: Breakdown, config: RunConfig, teacher: Teacher, dtype: torch.dtype) -> Breakdown:
    """Return the memory of a step as `student.quantize_base` changes it.

    Args:
        memory: The memory of the step with plain weights.
        config: The configuration.
        teacher: The teacher, whose network is quantized.
        dtype: The dtype inside the networks.
    """
    kind = config.student.quantize_base
    if kind == "none":
        return memory
    return dataclasses.replace(
        memory,
        frozen=memory.frozen - saved_bytes(teacher.network, kind, dtype.itemsize),
        activations=memory.activations + largest_decoded(teacher.network, dtype.itemsize),
    )


def is_sharded(config: RunConfig, world: int) -> bool:
    """Return whether a run's weights are divided over its processes."""
    return config.run.shard == Shard.full and world > 1


def in_shards(memory: Breakdown, config: RunConfig, teacher: Teacher, dtype: torch.dtype, world: int) -> Breakdown:
    """Return the memory of a step whose weights are divided over processes.

    Gathered at the peak are a network's layers outside of its repeated blocks, the block in use and the next one, and the
    gradients of one block before they are divided.

    Args:
        memory: The memory of the step on one process.
        config: The configuration.
        teacher: The teacher, whose network has the blocks.
        dtype: The dtype inside the networks.
        world: The number of processes.
    """
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated_blocks(teacher.network)]
    largest, outside = max(blocks, default=0), memory.base - sum(blocks)
    gathered = dtype.itemsize * (outside + 2 * largest)
    if config.student.kind == "full":
        gathered += (dtype.itemsize + 4) * max(largest, outside)

    def share(size: int) -> int:
        return -(-size // world)

    return dataclasses.replace(
        memory,
        frozen=share(memory.frozen),
        student=share(memory.student),
        critic=share(memory.critic),
        target=share(memory.target),
        gradients=share(memory.gradients),
        optimizer=share(memory.optimizer),
        activations=memory.activations + gathered,
        shards=world,
    )


def _student(config: RunConfig, teacher: Teacher, dtype: torch.dtype) -> Student:
    """Return the student with its teacher and target on the meta device, computing as under autocast to `dtype`."""
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
            critic=getattr(config.objective, "critic", None),
        )
    for module in student.modules.modules():
        if isinstance(module, AutocastNetwork):
            module.forward = partial(_forward_without_autocast, module)
            if dtype != torch.float32:
                _emulate_autocast(module.network, dtype)
    return student


def _forward_without_autocast(
    network: AutocastNetwork, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None
) -> Tensor:
    """Run a network's forward pass; the meta device has no autocast."""
    return network.call(network.network, z, t, c, w).float()


def _emulate_autocast(network: nn.Module, dtype: torch.dtype) -> None:
    """Do what CUDA's autocast does to the modules of a network: products in `dtype`, norms in fp32."""

    def cast(module: Any, forward: Any, to: torch.dtype, x: Tensor) -> Tensor:
        parameters = dict(module._parameters)
        module._parameters.update({name: p.to(to) for name, p in parameters.items() if p is not None})
        try:
            return forward(x.to(to))
        finally:
            module._parameters.update(parameters)

    modules: list[Any] = list(network.modules())
    for module in modules:
        is_product, is_norm = (
            isinstance(module, kind) for kind in (nn.Linear | nn.Conv2d, nn.GroupNorm | nn.LayerNorm)
        )
        if is_product or is_norm:
            module.forward = partial(cast, module, module.forward, dtype if is_product else torch.float32)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Use an attention that never holds its whole matrix, as on a CPU or a GPU; the meta device would allocate it."""

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        compute = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return compute(query, key, value, 0.0, False, attn_mask=mask)[0]

    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def optimizer_bytes(name: str, count: int) -> int:
    """Return the bytes of an optimizer's two moments of `count` numbers: fp32, or 8 bits and a scale per 256 numbers."""
    return 8 * count if name == "adamw" else 2 * (count + 4 * -(-count // 256))
