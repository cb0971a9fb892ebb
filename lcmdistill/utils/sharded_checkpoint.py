"""Tensors of a checkpoint in the files of torch.distributed.checkpoint: each process writes, and reads, its own shards.

A group's tensors are saved as "group/name". Any number of processes can read what another number has written, and one
process without a launcher reads the tensors whole.
"""

import pickle
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.utils.atomic import PARTIAL, atomic_dir, hidden_sibling
from lcmdistill.utils.checksums import checksum
from lcmdistill.utils.errors import RunError, system_errors

METADATA = ".metadata"
"the file that lists the tensors and where their shards are"

Groups = Mapping[str, Mapping[str, Tensor]]


def is_sharded(path: Path) -> bool:
    """Return whether a checkpoint's tensors are in shards."""
    return (path / METADATA).is_file()


def save_shards(path: Path, groups: Groups, state: Mapping[str, Any], process_group: Any) -> None:
    """Write a checkpoint atomically. All processes call it, and it appears under its name when all have written.

    Args:
        path: The checkpoint's folder, which all processes share.
        groups: Tensors by name, by group: whole, or this process's shards.
        state: Plain values, of which the first process writes its own.
        process_group: A group of all processes that can exchange objects on the CPU.

    Raises:
        RunError: A process could not write its shards.
    """
    from torch import distributed

    if distributed.get_rank(process_group):
        distributed.barrier(process_group)
        _write(hidden_sibling(path, PARTIAL), groups, process_group)
        return
    with atomic_dir(path) as partial:
        distributed.barrier(process_group)
        checksums = _write(partial, groups, process_group)
        checksums[METADATA] = checksum(partial / METADATA)
        save_state(partial, {**state, "checksums": checksums})


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's plain values, `state.pt`."""
    with (folder / "state.pt").open("wb") as file, system_errors():
        torch.save(dict(state), file)


def _write(folder: Path, groups: Groups, process_group: Any) -> dict[str, str]:
    """Write this process's files; the first process gets the checksums of all."""
    from torch import distributed
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    tensors = {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}
    rank = distributed.get_rank(process_group)

    class Writer(checkpoint.FileSystemWriter):
        def write_data(self, *args: Any, **kwargs: Any) -> Any:
            with system_errors():  # before the error is sent to the other processes, without its cause
                return super().write_data(*args, **kwargs)

    try:
        writer = Writer(folder, single_file_per_rank=True)
        checkpoint.save(tensors, storage_writer=writer, process_group=process_group)
    except CheckpointException as error:  # not an Exception
        raise _cause(error) from error
    mine = {file.name: checksum(file) for file in folder.glob(f"__{rank}_*")}
    gathered: Any = [None] * distributed.get_world_size(process_group) if rank == 0 else None
    distributed.gather_object(mine, gathered, group=process_group)
    return {name: value for each in gathered or () for name, value in each.items()}


def _cause(error: Any) -> Exception:
    """Return the first process's own error, such as that of a full disk, or one that describes it."""
    first = next(iter(error.failures.values()))[0]
    return first if isinstance(first, OSError) else RunError(f"a checkpoint could not be written or read: {first}")


def read_whole(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return all tensors of a sharded checkpoint by group, whole, on the CPU.

    Raises:
        RuntimeError: The checkpoint is damaged.
    """
    described = _reader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in described.items()}
    _load(path, tensors)
    groups = defaultdict[str, dict[str, Tensor]](dict)  # a group without tensors is not in the files
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups


def read_shards(path: Path, groups: Groups) -> dict[str, dict[str, Tensor]]:
    """Read a checkpoint of either format into tensors: of a sharded tensor only this process's part.

    Args:
        path: The checkpoint's folder.
        groups: The tensors that are filled.

    Returns:
        The groups.

    Raises:
        RunError: The checkpoint holds other tensors.
        RuntimeError: It is damaged.
    """
    if is_sharded(path):
        tensors = {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}
        _check_same(tensors.keys(), _reader(path).read_metadata().state_dict_metadata.keys())
        _load(path, tensors)
    for group, named in {} if is_sharded(path) else groups.items():
        with safe_open(path / f"{group}.safetensors", framework="pt") as file:
            _check_same(named.keys(), file.keys())
            for name, value in named.items():
                _fill(value, file, name)
    return {group: dict(named) for group, named in groups.items()}


def _check_same(ours: Any, saved: Any) -> None:
    if set(ours) != set(saved):
        raise RunError("the checkpoint's parameters are not this student's; it was written by another version")


@torch.no_grad()
def _fill(value: Tensor, file: Any, name: str) -> None:
    """Copy a tensor of a file, or the part of it that is this process's shard."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(value, DTensor):
        value.copy_(file.get_tensor(name))
        return
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    part = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    if value.to_local().numel():
        value.to_local().copy_(file.get_slice(name)[part])


def _load(path: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is intended
            # Each process reads on its own: no process waits for one that finds another checkpoint damaged.
            checkpoint.load(tensors, storage_reader=_reader(path), no_dist=True)
    except CheckpointException as error:
        raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error


def _reader(path: Path) -> Any:
    """Return torch's reader, which unpickles nothing but the description of tensors."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with (path / METADATA).open("rb") as file:
                try:
                    metadata = _DescriptionUnpickler(file).load()
                    metadata.storage_meta = None
                    return metadata
                except Exception as error:  # damaged bytes are instructions to the unpickler
                    raise pickle.UnpicklingError(f"{METADATA} cannot be read: {error}") from error

    return Reader(path)


_TORCH = "torch.distributed.checkpoint"

_NAMES = {
    f"{_TORCH}.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    f"{_TORCH}.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath WindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath",  # Python 3.13
}
"what a description refers to, by module. With other names of the same modules a file could call their functions"


class _DescriptionUnpickler(pickle.Unpickler):
    """Unpickle the classes that describe tensors; a file that names any other is damaged or dangerous."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class by its name."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"{METADATA} refers to {module}.{name}")
        return super().find_class(module, name)
