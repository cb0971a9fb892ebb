"""How the processes of a run share its networks: each holds them whole (one process, or DDP), or a shard of each (FSDP2).

`run.shard` decides. With shards a network's repeated blocks are gathered one at a time, when they are evaluated, so no device
ever holds a network whole; weights, gradients, moments and the EMA stay in shards. A process that evaluates a sharded network
needs all others to take part: see `Shards.lead`.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lcmdistill.config.schema import AutoOnOff, RunConfig, Shard
from lcmdistill.students.student import AdapterView, Student
from lcmdistill.training.checkpoint import CheckpointWriter
from lcmdistill.training.compile import repeated_blocks
from lcmdistill.training.distributed import Accelerator, gather
from lcmdistill.utils.checkpoint import Groups, prune, read_groups
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import step_name
from lcmdistill.utils.sharded_checkpoint import read_shards, save_shards

logger = logging.getLogger(__name__)

T = TypeVar("T")


def shard_obstacle(config: RunConfig, device: torch.device) -> str | None:
    """Return why a run cannot be sharded, with what to do about it; None if it can."""
    if device.type not in ("cuda", "cpu"):
        return f"shards need CUDA or a CPU, and the device is {device.type}; use --shard off"
    if compute_dtype(config.run.precision, device) == torch.float16:
        return "fp16 needs a loss scaler, which does not know shards; use --precision bf16 or fp32"
    if config.student.offload_target:
        return "student.offload_target keeps the EMA whole on the CPU; set it to false"
    if config.optim.optimizer != "adamw":
        return f"optim.optimizer {config.optim.optimizer} does not know shards; use adamw"
    if config.data.teacher_cache_samples:
        return "data.teacher_cache_samples runs a whole teacher on each device; set it to 0"
    if config.student.quantize_base != "none":
        return f"student.quantize_base {config.student.quantize_base} does not know shards; set it to none"
    if config.run.compile == AutoOnOff.on:
        return "compiling sharded networks is not supported; use --compile auto or off"
    return None


def check_sharding(config: RunConfig, device: torch.device) -> None:
    """Raise UsageError if `run.shard` is full and the run cannot be sharded."""
    obstacle = shard_obstacle(config, device) if config.run.shard == Shard.full else None
    if obstacle:
        raise UsageError(f"--shard full: {obstacle}")


class Replicas:
    """Each process holds whole networks, and DDP averages their gradients; or there is one process only."""

    is_sharded = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.writes: bool = accelerator.is_main_process
        "whether this process writes checkpoints"

    def distribute(self, student: Student) -> Student:
        """Return a student, built by every process, as this process holds it."""
        return student

    def trained(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Return a module whose gradients the processes share, and its optimizer."""
        return self.accelerator.prepare(module, optimizer)

    def accumulating(self, module: Any, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a micro-batch's backward pass: gradients are shared after the last one only."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        self.accelerator.backward(loss)

    def clip(self, parameters: Mapping[str, Tensor], limit: float) -> Tensor:
        """Clip the gradients to a norm over all of them, and return the norm before."""
        trained: Any = list(parameters.values())
        return torch.as_tensor(self.accelerator.clip_grad_norm_(trained, limit))

    def all_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether all values are finite."""
        return all(bool(value.isfinite().all()) for value in tensors.values())

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors whole, on the main process; {} on others may do."""
        return tensors

    def lead(self, student: Student, work: Callable[[Any], T]) -> T | None:
        """Do work with a student's network on the main process only. All processes call it; others return None."""
        return work(student.for_sampling()) if self.accelerator.is_main_process else None

    def agreed(self, value: bool) -> bool:
        """Return the main process's value, if that process needs the others for what depends on it."""
        return value

    def product(self, student: Student) -> Student:
        """Return the trained student as the main process writes it. All processes call it."""
        return student

    def writer(self, folder: Path, keep: int) -> CheckpointWriter:
        """Return the writer of a run's checkpoints."""
        return CheckpointWriter(folder, keep)

    def reader(self, groups: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> Callable[[Path], Groups]:
        """Return what reads the tensors of a checkpoint that this process needs. groups: those that a checkpoint holds."""
        return read_groups


class Shards(Replicas):
    """Each process holds a shard of every tensor of every network (`torch.distributed.fsdp.fully_shard`)."""

    is_sharded = True

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype) -> None:
        from torch import distributed

        super().__init__(accelerator)
        self.writes = True
        self._mesh = distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._dtype = dtype
        # The main process may sample, or write, for long. Each thread that communicates has a group of its own.
        new_group: Any = partial(distributed.new_group, backend="gloo", timeout=timedelta(hours=12))
        self._talk, self._save = new_group(), new_group()
        self._skeleton: Any = None
        self._optimizers: list[torch.optim.Optimizer] = []

    def distribute(self, student: Student) -> Student:
        """Return the student with all of its networks in shards on the device. Their whole weights are freed."""
        networks = list(dict.fromkeys(map(_network_of, student.modules)))
        places = {
            id(parameter): (module, name)
            for network in networks
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        named = [student.trainable, student.averaged, student.critic_trainable]
        placed = [{name: places[id(value)] for name, value in tensors.items()} for tensors in named]
        if student.adapter is None and self.accelerator.is_main_process:
            self._skeleton = _without_weights(student.network)
        for network in networks:
            self._shard(network)
        # Sharding replaces the parameters.
        trainable, averaged, critic = (
            {name: module._parameters[key] for name, (module, key) in places.items()} for places in placed
        )
        return replace(student, trainable=trainable, averaged=averaged, critic_trainable=critic)

    def _shard(self, network: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        # Autocast rounds the weights anyway: they are communicated in that precision, and gradients in fp32.
        rounded = self._dtype if self._dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*repeated_blocks(network), network):
            whole = [p for p in module.parameters() if not isinstance(p, DTensor)]
            # The root, too, is freed after a forward pass: the EMA changes its shards before the next one.
            fully_shard(module, mesh=self._mesh, mp_policy=policy, reshard_after_forward=True)
            for parameter in whole:
                parameter.data = parameter.data.new_empty(0)  # whoever still refers to it

    def trained(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Return the module and its optimizer: they are in shards."""
        self._optimizers.append(optimizer)
        return module, optimizer

    def accumulating(self, module: Any, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return no context: each micro-batch's gradients are divided at once, so that no device holds them whole."""
        return contextlib.nullcontext()

    def clip(self, parameters: Mapping[str, Tensor], limit: float) -> Tensor:
        """Clip the gradients to the norm over all shards, and return the norm before."""
        norm: Any = super().clip(parameters, limit)
        return norm.full_tensor()

    def all_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether all values are finite, on all processes."""
        mine = super().all_finite({name: _local(value) for name, value in tensors.items()})
        return bool(gather(torch.tensor(float(mine), device=self.accelerator.device), self.accelerator).min())

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors whole, on the CPU of the main process. A device holds one of them at a time."""
        result = {}
        for name, value in tensors.items():
            gathered: Any = value.detach()
            gathered = gathered.full_tensor()
            if self.accelerator.is_main_process:
                result[name] = gathered.cpu()
        return result

    def lead(self, student: Student, work: Callable[[Any], T]) -> T | None:
        """Do work on the main process, which announces each evaluation of the network so that the others take part."""
        network = student.for_sampling()  # all choose the same adapter
        device = self.accelerator.device
        with self._autocast(network):
            if not self.accelerator.is_main_process:
                with torch.no_grad():
                    while (call := self._broadcast(None)) is not None:
                        args, kwargs = tree_map_only(Tensor, lambda value: value.to(device), call)
                        network(*args, **kwargs)
                return None

            def announce(module: nn.Module, args: Any, kwargs: Any) -> None:
                self._broadcast(tree_map_only(Tensor, lambda value: value.cpu(), (args, kwargs)))

            hook = network.register_forward_pre_hook(announce, with_kwargs=True, prepend=True)
            try:
                result = work(network)
            finally:
                hook.remove()
        # After an error the others may be in the middle of an evaluation: the launcher ends them.
        self._broadcast(None)
        return result

    @contextlib.contextmanager
    def _autocast(self, network: Any) -> Iterator[None]:
        """Evaluate a network in the precision that its gathered weights have, whatever a pipeline sets around it."""
        if self._dtype != torch.float32:
            network.forward = torch.autocast(self.accelerator.device.type, dtype=self._dtype)(network.forward)
        try:
            yield
        finally:
            vars(network).pop("forward", None)

    def agreed(self, value: bool) -> bool:
        """Return the main process's value."""
        return self._broadcast(value)

    def _broadcast(self, value: Any) -> Any:
        """Return the main process's value on all."""
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._talk)
        return values[0]

    def product(self, student: Student) -> Student:
        """Return the trained student with whole weights, on the CPU of the main process."""
        weights = self.whole(student.weights)
        if not self.accelerator.is_main_process:
            return student
        if self._skeleton is not None:
            self._skeleton.load_state_dict(weights, strict=False, assign=True)  # the buffers are there
            student = replace(student, network=self._skeleton)
        return replace(student, trainable=weights, averaged={})

    def writer(self, folder: Path, keep: int) -> CheckpointWriter:
        """Return a writer that all processes call, and of which each writes its shards."""
        return ShardWriter(folder, keep, self._save)

    def reader(self, groups: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> Callable[[Path], Groups]:
        """Return what reads this process's shards, of a checkpoint that any number of processes wrote, sharded or not."""

        def read(path: Path) -> Groups:
            for optimizer in self._optimizers:
                _create_moments(optimizer)
            return read_shards(path, groups())

        return read


class ShardWriter(CheckpointWriter):
    """Write checkpoints in a thread as CheckpointWriter does: each process its shards, at the same time."""

    def __init__(self, folder: Path, keep: int, process_group: Any) -> None:
        super().__init__(folder, keep)
        self._group = process_group

    def _write(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        from torch import distributed

        save_shards(self._folder / step_name(step), groups, {"step": step, **state}, self._group)
        if distributed.get_rank() == 0:
            prune(self._folder, self._keep, last=step)


def make_sharing(config: RunConfig, accelerator: Accelerator) -> Replicas:
    """Return how the processes share the networks, for a configuration whose memory is planned."""
    if config.run.shard == Shard.full and accelerator.num_processes == 1:
        logger.info("--shard full has no effect on one process; start several with torchrun")
    elif config.run.shard == Shard.full:
        check_sharding(config, accelerator.device)
        return Shards(accelerator, compute_dtype(config.run.precision, accelerator.device))
    return Replicas(accelerator)


def _network_of(module: nn.Module) -> Any:
    """Return the network inside a student's module."""
    view: Any = module.shared if isinstance(module, AdapterView) else module
    return view.network


def _without_weights(network: nn.Module) -> nn.Module:
    """Return a copy of a network with its buffers, and with parameters that have no data."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def _local(value: Any) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return value.to_local() if hasattr(value, "to_local") else value


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that its first step would, for a checkpoint to be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        group["lr"] = 0.0  # each step sets its own
    optimizer.step()
    optimizer.zero_grad()
