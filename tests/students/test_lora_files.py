"""What the LoRA files record."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcmdistill.students.lora_files import SCHEDULER_KEY, scheduler_of
from lcmdistill.utils.errors import UsageError


@pytest.mark.parametrize("name", ["os.system", "DiffusionPipeline", "utils", ""])
def test_only_schedulers_of_methods_are_taken_from_a_header(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, {SCHEDULER_KEY: name})
    with pytest.raises(UsageError, match=r"which no method samples with; known are .*LCMScheduler"):
        scheduler_of(str(path))
    save_file({"a": torch.zeros(1)}, path, {SCHEDULER_KEY: "TCDScheduler"})
    assert scheduler_of(str(path)) == "TCDScheduler"
