"""Sharded checkpoints as files; tests/training/test_sharding.py trains with them."""

import pickle
from pathlib import Path

import pytest

from lcmdistill.utils.sharded_checkpoint import METADATA, read_whole


def text(value: str) -> bytes:
    """Return the instructions that push a text onto the unpickler's stack."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, value: str) -> bytes:
    """Return the instructions that push what a module has under a name."""
    return text(module) + text(value) + b"\x93"


@pytest.mark.parametrize(
    "function",
    [
        name("torch.distributed.checkpoint.filesystem", "Path.write_text"),
        name("pathlib", "Path.write_text"),
        name("os", "system"),
        name("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    ],
)
def test_a_description_runs_no_code(function: bytes, tmp_path: Path) -> None:
    target = tmp_path / "written"
    path = name("pathlib", "PosixPath") + text(str(target)) + b"\x85R"
    (tmp_path / METADATA).write_bytes(b"\x80\x04" + function + path + text("x") + b"\x86R.")
    with pytest.raises(pickle.UnpicklingError, match="refers to"):
        read_whole(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04]K\x01K\x02s.", b"\x80\x04\x8c\xf0abc", b"\x80\x04."])
def test_a_damaged_description_is_damage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match="cannot be read"):
        read_whole(tmp_path)
