"""`student.quantize_base`: the frozen linear layers under a LoRA with 8 or 4 bits per weight.

Teacher and student share these layers, so both see the same rounding; the adapters stay in fp32. Layers compute in the
precision of the run, on weights that are decoded as they are used. Convolutions and norms are not quantized.

Shapes: O outputs and I inputs of a layer.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lcmdistill.utils.errors import UsageError

BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.5}
"bits per weight; nf4 includes a scale in fp32 per 64 weights"

_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def can_quantize(kind: str) -> bool:
    """Return whether the package that a kind of quantization needs is installed."""
    return importlib.util.find_spec(_PACKAGES[kind]) is not None


def check_quantization(kind: str) -> None:
    """Raise UsageError for a kind whose package is not installed."""
    if kind != "none" and not can_quantize(kind):
        raise UsageError(f"--quantize-base {kind} needs {_PACKAGES[kind]}: pip install 'lcmdistill[quantize]'")


def base_linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the path of each linear layer that is quantized: all but those of adapters, and tiny ones."""
    for path, module in network.named_modules():
        is_adapter = any(part.startswith("lora_") for part in path.split("."))
        if type(module) is nn.Linear and not is_adapter and min(module.weight.shape) >= 16:
            yield path, module


def saved_bytes(network: nn.Module, kind: str, itemsize: int) -> int:
    """Return by how many bytes quantization shrinks a network whose weights have `itemsize` bytes each."""
    saved = 0.0
    for _, layer in base_linears(network):
        scales = 4 * layer.weight.shape[0] if _PACKAGES[kind] == "torchao" else 0
        saved += layer.weight.numel() * (itemsize - BITS[kind] / 8) - scales
    return int(saved)


def largest_decoded(network: nn.Module, itemsize: int) -> int:
    """Return the bytes of the largest layer's weights while they are decoded."""
    return itemsize * max((layer.weight.numel() for _, layer in base_linears(network)), default=0)


def quantize_base(network: Any, kind: str) -> None:
    """Quantize the frozen linear layers of a network in place; its adapters stay as they are.

    Args:
        network: The teacher's network with its adapters. On the meta device nothing happens.
        kind: "int8", "fp8", "nf4" or "none".
    """
    if kind == "none" or network.device.type == "meta":
        return
    layers = dict(base_linears(network))
    if kind == "nf4":
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, _nf4(layer))
        return
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    chosen = set(layers.values())
    quantize_(network, config, filter_fn=lambda module, path: module in chosen)


def _nf4(layer: nn.Linear) -> Any:
    """Return a linear layer of bitsandbytes with the weights (O, I) of another."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]

    weight, bias = layer.weight, layer.bias
    with torch.device("meta"):
        quantized = Linear4bit(
            layer.in_features, layer.out_features, bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
        )
    quantized.weight = Params4bit(weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    quantized.bias = bias
    return quantized.to(weight.device)
