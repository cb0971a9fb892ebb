"""LoRA adapters on the teacher's network, which is the teacher, bit for bit, while no adapter is active.

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

ONLINE, TARGET, CRITIC = "online", "target", "critic"


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


def add_lora(network: Any, name: str, config: StudentConfig, seed: int) -> None:
    """Add a trainable adapter in fp32 to a network and freeze everything else.

    Args:
        network: The teacher's network.
        name: The adapter's name.
        config: The [student] section.
        seed: The run's seed, for the initial weights.

    Raises:
        UsageError: As `check_layers` does.
    """
    check_layers(network, config)
    # peft declares lora_alpha as an integer, and scales by any number.
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    _inject(network, name, target_modules=list(config.target_modules), **settings)
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora-init"))
    for layer in lora_layers(network).values():
        layer.cast_input_dtype_enabled = False  # autocast casts; peft would cast activations to fp32
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.float()
        down = layer.lora_A[name].weight
        if down.device.type != "meta":
            initial = nn.init.kaiming_uniform_(torch.empty(down.shape), a=math.sqrt(5), generator=generator)
            down.data.copy_(initial)
    for parameter_name, parameter in network.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)


def _inject(network: Any, name: str, **settings: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the target next to the student is intended
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
    _inject(network, name, target_modules=list(lora), rank_pattern=ranks, alpha_pattern=alphas)
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


def check_layers(network: Any, config: StudentConfig) -> None:
    """Check that a network can have the configured LoRA.

    Raises:
        UsageError: No layer has a name, a layer takes no LoRA, or the rank exceeds a layer's width.
    """
    named = [(path, getattr(module, "base_layer", module)) for path, module in network.named_modules()]
    chosen = {
        name: [(path, module) for path, module in named if path == name or path.endswith(f".{name}")]
        for name in config.target_modules
    }
    # The default list covers every U-Net; some U-Nets lack a few of its names.
    absent = [name for name, layers in chosen.items() if not layers and name not in LORA_MODULES]
    if absent or not any(chosen.values()):
        raise UsageError(
            f"student.target_modules: no layer of the teacher is named {', '.join(map(repr, absent or chosen))}; "
            "specify layers such as to_q, one per --target-modules"
        )
    widths = {}
    for path, module in itertools.chain(*chosen.values()):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise UsageError(
                f"student.target_modules: {path} ({type(module).__name__}) is neither a linear layer nor a convolution; "
                "specify layers such as to_q"
            )
        widths[path] = min(module.weight.shape[0], module.weight.shape[1:].numel())
    narrow = min(widths, key=lambda path: widths[path])
    if config.rank > widths[narrow]:
        raise UsageError(
            f"student.rank is {config.rank}, which exceeds the width of {narrow} ({widths[narrow]}) and saves no memory; "
            "lower --rank"
        )


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
