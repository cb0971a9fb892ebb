"""What the LoRA files record."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcmdistill.students.lora_files import SCHEDULER_KEY, family_of_lora, scheduler_of
from lcmdistill.utils.checksums import write_checksums
from lcmdistill.utils.errors import UsageError


@pytest.mark.parametrize("name", ["os.system", "DiffusionPipeline", "utils", ""])
def test_only_schedulers_of_methods_are_taken_from_a_header(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, {SCHEDULER_KEY: name})
    with pytest.raises(UsageError, match=r"which no method samples with; known are .*LCMScheduler"):
        scheduler_of(str(path))
    save_file({"a": torch.zeros(1)}, path, {SCHEDULER_KEY: "TCDScheduler"})
    assert scheduler_of(str(path)) == "TCDScheduler"


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_damaged_lora_of_a_run_is_named(is_recorded: bool, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    save_file({"a": torch.ones(8)}, path)
    if is_recorded:
        write_checksums(tmp_path)
    for content in (b"", path.read_bytes()[:-7], b"\xff" * 99):
        path.write_bytes(content)
        message = "was changed or damaged after the run wrote it" if is_recorded else "is not a safetensors file"
        with pytest.raises(UsageError, match=f"{path} {message}"):
            family_of_lora(tmp_path)
