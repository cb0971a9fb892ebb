"""`student.quantize_base`: the frozen linear layers under a LoRA with 8 or 4 bits per weight.

Teacher and student share these layers, so both see the same rounding; the adapters stay in fp32. Layers compute in the
precision of the run, on weights that are decoded as they are used, in the forward and again in the backward pass: autograd
keeps no decoded weights. Convolutions, norms and embeddings are not quantized.

Shapes: O outputs and I inputs of a layer.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lcmdistill.utils.errors import UsageError

BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.5}
"bits per weight; nf4 includes a scale in fp32 per 64 weights"

TIME_LAYER = "time_emb_proj"
"name of the layer of a U-Net's repeated blocks whose input is the time only"

_LARGEST = {"int8": 127.0, "fp8": 448.0}
"the largest code of an output's weights; its scale is stored once per output"

_BLOCK = 64
"weights that share a scale in nf4"


def can_quantize(kind: str) -> bool:
    """Return whether the package that a kind of quantization needs is installed."""
    return kind != "nf4" or importlib.util.find_spec("bitsandbytes") is not None


def check_quantization(kind: str) -> None:
    """Raise UsageError for a kind whose package is not installed."""
    if not can_quantize(kind):
        raise UsageError(
            f"--quantize-base {kind} needs bitsandbytes: pip install 'lcmdistill[quantize]', or use --quantize-base int8"
        )


def base_linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the path of each linear layer that is quantized: those of repeated blocks, but no adapters and no tiny layers.

    Layers that embed the time stay as they are, as do those outside of the blocks: they hold a few percent of the weights, and
    a consistency loss compares neighboring times. In 4 bits they changed that of a random teacher by 23 %, all others by 5 %.
    """
    for path, module in network.named_modules():
        parts = path.split(".")
        is_repeated = any(part.isdigit() for part in parts) and TIME_LAYER not in parts
        is_adapter = any(part.startswith("lora_") for part in parts)
        if type(module) is nn.Linear and is_repeated and not is_adapter and min(module.weight.shape) >= 16:
            yield path, module


def saved_bytes(network: nn.Module, kind: str, itemsize: int) -> int:
    """Return by how many bytes quantization shrinks a network whose weights have `itemsize` bytes each."""
    saved = 0.0
    for _, layer in base_linears(network):
        scales = itemsize * layer.weight.shape[0] if kind in _LARGEST else 0
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
    for path, layer in list(base_linears(network)):
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, QuantizedLinear(layer, kind))


class QuantizedLinear(nn.Module):
    """A frozen linear layer that stores its weights (O, I) in 8 or 4 bits.

    The codes are stored as integers, which no change of a network's dtype casts, and as parameters, which DDP sends once.
    """

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        """Quantize a layer.

        Args:
            layer: The layer.
            kind: "int8", "fp8" or "nf4".
        """
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, layer.in_features, layer.out_features
        self.bias = layer.bias
        codes, scale = _encoded(layer.weight.detach(), kind)
        self.weight, self.scale = (nn.Parameter(value, requires_grad=False) for value in (codes, scale))

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weights (O, I)."""
        if self.kind == "int8":
            return self.weight * self.scale.to(dtype)
        if self.kind == "fp8":
            return self.weight.view(torch.float8_e4m3fn).to(dtype).mul_(self.scale.to(dtype))
        from bitsandbytes.functional import QuantState, dequantize_4bit  # pyright: ignore[reportMissingImports]

        absmax, shape = self.scale.view(torch.float32), torch.Size((self.out_features, self.in_features))
        return dequantize_4bit(self.weight, QuantState(absmax, shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, in autocast's dtype as a plain layer does."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """The product of inputs and decoded weights. Autograd's own would keep the decoded weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return functional.linear(x.to(dtype), layer.decoded(dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return (grad @ ctx.layer.decoded(grad.dtype)).to(ctx.dtype), None


def _encoded(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the codes of weights (O, I), and their scales."""
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit  # pyright: ignore[reportMissingImports]

        codes, state = quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
        return codes, state.absmax.view(torch.uint8)
    largest = _LARGEST[kind]
    # Rounded to the weights' dtype first: codes are of the scale that decodes them.
    scale = (weight.abs().amax(1, keepdim=True).float() / largest).to(weight.dtype)
    scale = scale.clamp_min(torch.finfo(weight.dtype).tiny)
    scaled = (weight.float() / scale.float()).clamp(-largest, largest)
    return scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale
