"""Helpers that several tests share."""

from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.schema import StudentConfig
from lcmdistill.diffusion.random import Rng
from lcmdistill.students.build import make_student
from lcmdistill.teachers.loading import load_teacher


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], None]:
    rng = Rng(seed, 0, range(2))
    return rng.normal("z", (4, 8, 8)), torch.tensor([999, 259]), {"prompt_embeds": rng.normal("c", (77, 16))}, None


def lora_student(folder: Path, **options: Any):
    teacher = load_teacher(str(folder))
    bare = teacher.call(teacher.network, *example())
    config = StudentConfig(kind="lora", **{"rank": 4, "alpha": 3.0, **options})
    return bare, make_student(teacher, config, dtype=torch.float32, seed=0, checkpointing=False)


def disturb(parameters: Any, seed: int = 0) -> None:
    """Weights as after a long training: an untouched lora_B is zero and would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
