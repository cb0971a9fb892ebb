"""The LoRA student: an adapter on the teacher's own network, which with the adapter off is the teacher, bit for bit.

Shapes: r rank, I inputs and O outputs of a layer.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.config.schema import LORA_MODULES, StudentConfig
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.utils.errors import UsageError

ONLINE, TARGET = "online", "target"


@dataclass(frozen=True)
class LoraLayer:
    """One layer's low-rank update, (alpha / r) up down. down: (r, I, ...); up: (O, r, ...); alpha: > 0."""

    down: Tensor
    up: Tensor
    alpha: float


def add_lora(network: Any, name: str, config: StudentConfig, seed: int) -> None:
    """Add an adapter to a network, its first weights drawn from the seed; everything else is frozen.

    The adapter is fp32 whatever the base is. Raises UsageError as `check_layers` does.
    """
    check_layers(network, config)
    # peft scales by any number, though it declares a whole one.
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    _inject(network, name, target_modules=list(config.target_modules), **settings)
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora-init"))
    for layer in lora_layers(network).values():
        layer.cast_input_dtype_enabled = False  # autocast knows what to cast: not activations to the adapter's fp32
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.float()
        down = layer.lora_A[name].weight
        if down.device.type != "meta":
            fresh = nn.init.kaiming_uniform_(torch.empty(down.shape), a=math.sqrt(5), generator=generator)
            down.data.copy_(fresh)
    for parameter_name, parameter in network.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)


def _inject(network: Any, name: str, **settings: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a target beside the student is meant
        inject_adapter_in_model(LoraConfig(**settings), network, name)
    choose_adapter(lora_layers(network).values(), name)


@torch.no_grad()
def put_lora(network: Any, lora: Mapping[str, LoraLayer], name: str) -> None:
    """Add an adapter that there is already, {a layer's path: its update}; only these layers get one."""
    ranks = {path: layer.down.shape[0] for path, layer in lora.items()}
    alphas = {path: layer.alpha for path, layer in lora.items()}
    _inject(network, name, target_modules=list(lora), rank_pattern=ranks, alpha_pattern=alphas)
    for key, parameter in adapter_parameters(network, name).items():
        path, _, part = key.rpartition(".")
        parameter.copy_(lora[path].down if part == "lora_A" else lora[path].up)


def choose_adapters(network: Any, names: Sequence[str], scales: Sequence[float]) -> None:
    """Let several adapters act at once, each at its weight."""
    for layer in lora_layers(network).values():
        on_it = [(name, scale) for name, scale in zip(names, scales, strict=True) if name in layer.lora_A]
        layer.set_adapter([name for name, _ in on_it])
        for name, scale in on_it:
            layer.set_scale(name, scale)


def merge_lora(network: Any) -> None:
    """Add the adapter that acts to the network's own weights, and take peft's layers away."""
    from diffusers.utils import recurse_remove_peft_layers

    for layer in lora_layers(network).values():
        layer.merge()
    recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config


def check_layers(network: Any, config: StudentConfig) -> None:
    """Raise UsageError for a name that no layer has, one of a part that no LoRA can be on, and a rank above a layer's width."""
    named = [(path, getattr(module, "base_layer", module)) for path, module in network.named_modules()]
    chosen = {
        name: [(path, module) for path, module in named if path == name or path.endswith(f".{name}")]
        for name in config.target_modules
    }
    # The published list is for any U-Net, and some have not all of it.
    absent = [name for name, layers in chosen.items() if not layers and name not in LORA_MODULES]
    if absent or not any(chosen.values()):
        raise UsageError(
            f"student.target_modules: no layer of the teacher is named {', '.join(map(repr, absent or chosen))}; name layers "
            "such as to_q, one a --target-modules"
        )
    widths = {}
    for path, module in itertools.chain(*chosen.values()):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise UsageError(
                f"student.target_modules: {path} ({type(module).__name__}) is neither a linear layer nor a convolution; "
                "name layers such as to_q"
            )
        widths[path] = min(module.weight.shape[0], module.weight.shape[1:].numel())
    narrow = min(widths, key=lambda path: widths[path])
    if config.rank > widths[narrow]:
        raise UsageError(
            f"student.rank is {config.rank}, above the width of {narrow}, {widths[narrow]}; a rank so high saves nothing: "
            "lower --rank"
        )


def lora_layers(network: Any) -> dict[str, Any]:
    """{path: peft layer} of every layer that an adapter sits on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def choose_adapter(layers: Iterable[Any], name: str | None, *, dropout: bool = False) -> None:
    """Let one adapter act, or none; its dropout acts in training only, whatever mode the network is in.

    layers: of `lora_layers`. Which adapter learns stays as it is.
    """
    for layer in layers:
        # peft's own way also passes through every parameter, to let what acts learn: three switches a step cost more
        # than a small step itself.
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
        for module in layer.lora_dropout.values():
            module.training = dropout


def adapter_parameters(network: Any, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters, by the path of their layer: "mid_block....to_q.lora_A"."""
    found: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(network).items():
        if name not in layer.lora_A:
            continue
        found[f"{path}.lora_A"] = layer.lora_A[name].weight
        found[f"{path}.lora_B"] = layer.lora_B[name].weight
    return found
