"""What both trainings share: the time budget, checkpoints, weight averaging, and picture grids."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn


class Budget:
    """A training's budget in minutes of an idle machine; it goes on counting where an interrupted run stopped.

    Processor time of each thread is counted: other load makes a training last longer, not see fewer samples.
    """

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.seconds = minutes * 60
        self._start = _seconds() - spent

    @property
    def spent(self) -> float:
        """Seconds spent, those of earlier runs included."""
        return _seconds() - self._start

    @property
    def progress(self) -> float:
        """The share of the budget spent, at most 1."""
        return min(self.spent / self.seconds, 1.0)


def _seconds() -> float:
    return time.process_time() / torch.get_num_threads()


def learning_rate(peak: float, progress: float, warmup: float = 0.02, final: float = 0.01) -> float:
    """Linear warm-up, then a cosine from ``peak`` down to ``final`` times ``peak``."""
    if progress < warmup:
        return peak * (0.02 + 0.98 * progress / warmup)
    wave = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (final + (1 - final) * wave)


class WeightAverage:
    """An exponential moving average of the weights of several modules."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self._modules = modules
        self.weights = {key: value.detach().clone() for key, value in self._live().items()}

    def _live(self) -> dict[str, Tensor]:
        """The weights as they are now."""
        return {f"{name}.{key}": value for name, m in self._modules.items() for key, value in m.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the live weights, faster while training is young."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = self._live()
        for key, average in self.weights.items():
            average.lerp_(live[key], 1 - decay)

    def of(self, name: str) -> dict[str, Tensor]:
        """The averaged state dict of one module."""
        return {key[len(name) + 1 :]: value for key, value in self.weights.items() if key.startswith(name + ".")}


def save_aside(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    torch.save(state, aside)
    os.replace(aside, path)


def load_if_there(path: Path) -> dict[str, Any] | None:
    """The checkpoint at ``path``, or None where there is none yet."""
    return torch.load(path, weights_only=True) if path.exists() else None


def to_uint8(images: Tensor) -> np.ndarray:
    """Images in -1..1, (count, 3, height, width), as uint8 (count, height, width, 3)."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def save_grid(images: Iterable[np.ndarray], columns: int, path: Path, scale: int = 2) -> None:
    """Save equally sized uint8 images as one picture, row by row."""
    cells = list(images)
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    canvas = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = cell
    picture = Image.fromarray(canvas)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def encode(vae: AutoencoderKL, images: Tensor) -> Any:
    """The distribution of the latents of images in -1..1."""
    return vae.encode(images).latent_dist  # pyright: ignore[reportAttributeAccessIssue]


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The images of unscaled latents."""
    return vae.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


def scaling_factor(vae: AutoencoderKL) -> float:
    """What multiplies the latents before they are noised."""
    return float(vae.config["scaling_factor"])
