"""AdamW, from torch or bitsandbytes, and the learning rate of each step."""

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig
from lcmdistill.utils.errors import UsageError


def check_optimizer(optim: OptimConfig, device: torch.device) -> None:
    """Raise UsageError for an optimizer that this device or this installation does not have."""
    if optim.optimizer == "adamw8bit" and device.type != "cuda":
        raise UsageError(f"optim.optimizer adamw8bit runs on CUDA only, and the device is {device.type}; use adamw")
    if optim.optimizer == "adamw8bit" and not has_bitsandbytes():
        raise UsageError("optim.optimizer adamw8bit needs: pip install 'lcmdistill[8bit]'")


def has_bitsandbytes() -> bool:
    """Return whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def make_optimizer(optim: OptimConfig, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of a run, for parameters on their device."""
    trained = list(parameters)
    if optim.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(
            trained,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
        )
    return torch.optim.AdamW(
        trained,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate_at(step: int, optim: OptimConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then constant, or cosine or linear decay to 0."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, optim.max_train_steps - optim.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return optim.learning_rate * factor[optim.lr_scheduler]
