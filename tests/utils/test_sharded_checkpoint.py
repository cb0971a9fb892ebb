"""Sharded checkpoints as files; tests/training/test_sharding.py trains with them."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from lcmdistill.utils.errors import explain
from lcmdistill.utils.sharded_checkpoint import METADATA, read_whole, save_shards, save_state


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own error would be about a position in an archive."""
    (tmp_path / "state.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, {"values": torch.zeros(10_000)})
    checkpoint = tmp_path / "step-1"

    def open_full(path: Path, *args: Any) -> Any:
        return open_file(Path("/dev/full") if path.suffix == ".distcp" else path, *args)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", open_full)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            save_shards(checkpoint, {"student": {"a": torch.zeros(10_000)}}, {}, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
    assert explain(caught.value)[0].startswith("no space left on device")
    assert not checkpoint.exists()
