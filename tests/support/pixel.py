"""Helpers that several tests share."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(folder: Path, captions: list[str | None], side: int = 8) -> Path:
    """A folder of grey images, the i-th of brightness 20 i, with captions beside those that have one."""
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.new("L", (side, side), 20 * i).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)
    return folder
