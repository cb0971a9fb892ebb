"""AdamW, in the library that the configuration names, and what the learning rate does."""

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig
from lcmdistill.utils.errors import UsageError


def check_optimizer(optim: OptimConfig, device: torch.device) -> None:
    """Raise UsageError for an optimiser that this device or this installation does not have."""
    if optim.optimizer == "adamw8bit" and device.type != "cuda":
        raise UsageError(f"optim.optimizer adamw8bit runs on CUDA only, and the device is {device.type}; use adamw")
    if optim.optimizer == "adamw8bit" and not has_eight_bits():
        raise UsageError("optim.optimizer adamw8bit needs: pip install 'lcmdistill[8bit]'")


def has_eight_bits() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def make_optimizer(optim: OptimConfig, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of a run, on its device."""
    chosen = list(parameters)
    if optim.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(
            chosen,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
        )
    return torch.optim.AdamW(
        chosen,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate_at(step: int, optim: OptimConfig) -> float:
    """The learning rate of a step, a function of its number: linear warm-up, then constant, cosine or linear to 0."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, optim.max_train_steps - optim.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return optim.learning_rate * factor[optim.lr_scheduler]
