"""LoRA adapters on the teacher's network, which is the teacher, bit for bit, while no adapter is active.

Shapes: r rank, I inputs and O outputs of a layer.
"""

import itertools
import math
from typing import Any

import torch
from torch import nn

from lcmdistill.config.schema import LORA_MODULES, StudentConfig
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.teachers.lora.adapters import inject_adapter, lora_layers
from lcmdistill.utils.errors import UsageError

ONLINE, TARGET, CRITIC = "online", "target", "critic"


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
    inject_adapter(network, name, target_modules=list(config.target_modules), **settings)
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
