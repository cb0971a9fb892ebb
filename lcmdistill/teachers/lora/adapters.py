"""peft adapters on a network: add, select, read and merge. Without an active one the network is the base, bit for bit.

Shapes: r rank, I inputs and O outputs of a layer.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraLayer:
    """One layer's low-rank update, (alpha / r) up down.

    Attributes:
        down: (r, I, ...).
        up: (O, r, ...).
        alpha: Above 0.
    """

    down: Tensor
    up: Tensor
    alpha: float


def inject_adapter(network: Any, name: str, **settings: Any) -> None:
    """Add an adapter with the settings of a peft LoraConfig to a network, and activate it."""
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
        inject_adapter_in_model(LoraConfig(**settings), network, name)
    choose_adapter(lora_layers(network).values(), name)


@torch.no_grad()
def put_lora(network: Any, lora: Mapping[str, LoraLayer], name: str) -> None:
    """Add an existing adapter to a network.

    Args:
        network: The network that it was trained on.
        lora: {layer path: update}; other layers get none.
        name: The adapter's name.
    """
    ranks = {path: layer.down.shape[0] for path, layer in lora.items()}
    alphas = {path: layer.alpha for path, layer in lora.items()}
    inject_adapter(network, name, target_modules=list(lora), rank_pattern=ranks, alpha_pattern=alphas)
    for key, parameter in adapter_parameters(network, name).items():
        path, _, part = key.rpartition(".")
        parameter.copy_(lora[path].down if part == "lora_A" else lora[path].up)


def choose_adapters(network: Any, names: Sequence[str], scales: Sequence[float]) -> None:
    """Activate several adapters at once.

    Args:
        network: A network with these adapters.
        names: The adapters' names.
        scales: The weight of each.
    """
    for layer in lora_layers(network).values():
        present = [(name, scale) for name, scale in zip(names, scales, strict=True) if name in layer.lora_A]
        layer.set_adapter([name for name, _ in present])
        for name, scale in present:
            layer.set_scale(name, scale)


def merge_lora(network: Any) -> None:
    """Merge the active adapter into the network's weights, and remove peft's layers."""
    from diffusers.utils import recurse_remove_peft_layers

    for layer in lora_layers(network).values():
        layer.merge()
    recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config


def lora_layers(network: Any) -> dict[str, Any]:
    """Return {path: peft layer} for every layer with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def choose_adapter(layers: Iterable[Any], name: str | None, *, dropout: bool = False) -> None:
    """Activate one adapter, or none. Which adapter is trained stays as it is.

    Args:
        layers: Those of `lora_layers`.
        name: The adapter; None deactivates all.
        dropout: Whether its dropout is active, whatever the network's mode.
    """
    for layer in layers:
        # peft's own switch also visits every parameter to make it trainable. Three switches per step would cost more
        # than a small step.
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
        for module in layer.lora_dropout.values():
            module.training = dropout


def adapter_parameters(network: Any, name: str) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by the path of their layer: "mid_block....to_q.lora_A"."""
    parameters: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(network).items():
        if name not in layer.lora_A:
            continue
        parameters[f"{path}.lora_A"] = layer.lora_A[name].weight
        parameters[f"{path}.lora_B"] = layer.lora_B[name].weight
    return parameters


def padded(layers: Mapping[str, LoraLayer], rank: int) -> dict[str, LoraLayer]:
    """Return updates with alpha = r at one rank, the missing rows and columns zero."""

    def zeros(like: Tensor, axis: int) -> Tensor:
        shape = list(like.shape)
        shape[axis] = rank - shape[axis]
        return like.new_zeros(shape)

    return {
        path: LoraLayer(
            torch.cat([layer.down, zeros(layer.down, 0)]), torch.cat([layer.up, zeros(layer.up, 1)], 1), float(rank)
        )
        for path, layer in layers.items()
    }
