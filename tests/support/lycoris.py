"""LyCORIS files with random tensors in the layouts that its 4.1 release saves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RANK, ALPHA = 2, 1.5

Draw = Callable[..., Tensor]


def lora(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    """A plain LoRA: 1x1 up of a down with the layer's kernel."""
    tail = [1] * (weight.ndim - 2)
    down = draw(RANK, *weight.shape[1:])
    return {"lora_up.weight": draw(len(weight), RANK, *tail), "lora_down.weight": down, **alpha()}


def alpha() -> dict[str, Tensor]:
    return {"alpha": torch.tensor(ALPHA)}


def tucker(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    """A convolution as 1x1, r to r with the kernel, 1x1."""
    outputs, inputs, *kernel = weight.shape
    up, down = draw(outputs, RANK, 1, 1), draw(RANK, inputs, 1, 1)
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": draw(RANK, RANK, *kernel), **alpha()}


def dora(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    """A LoRA with a magnitude per output."""
    return {**lora(draw, weight), "dora_scale": 1 + draw(len(weight), *[1] * (weight.ndim - 1))}


def loha(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    outputs, inputs = weight.flatten(1).shape
    layer = {f"hada_w{i}_a": draw(outputs, RANK) for i in (1, 2)} | {f"hada_w{i}_b": draw(RANK, inputs) for i in (1, 2)}
    return layer | alpha()


def loha_tucker(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    outputs, inputs, *kernel = weight.shape
    layer = {f"hada_w{i}_a": draw(RANK, outputs) for i in (1, 2)} | {f"hada_w{i}_b": draw(RANK, inputs) for i in (1, 2)}
    return layer | {f"hada_t{i}": draw(RANK, RANK, *kernel) for i in (1, 2)} | alpha()


def lokr(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    """A small full matrix and a factored large one."""
    outputs, inputs, *kernel = weight.shape
    size = torch.Size(kernel).numel()
    second = {"lokr_w2_a": draw(outputs // 4, RANK), "lokr_w2_b": draw(RANK, inputs // 4 * size)}
    return {"lokr_w1": draw(4, 4), **second, **alpha()}


def lokr_full(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    """Two full matrices: alpha has no effect."""
    outputs, inputs, *kernel = weight.shape
    return {"lokr_w1": draw(4, 4), "lokr_w2": draw(outputs // 4, inputs // 4, *kernel), **alpha()}


def lokr_both(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    """Both factored."""
    layer = {key: value for key, value in lokr(draw, weight).items() if key != "lokr_w1"}
    return {"lokr_w1_a": draw(4, RANK), "lokr_w1_b": draw(RANK, 4), **layer}


def lokr_tucker(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    outputs, inputs, *kernel = weight.shape
    second = {"lokr_w2_a": draw(RANK, outputs // 4), "lokr_w2_b": draw(RANK, inputs // 4)}
    return {"lokr_w1": draw(4, 4), **second, "lokr_t2": draw(RANK, RANK, *kernel), **alpha()}


def norm(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    return {"w_norm": draw(len(weight)), "b_norm": draw(len(weight))}


def full(draw: Draw, weight: Tensor) -> dict[str, Tensor]:
    return {"diff": draw(*weight.shape), "diff_b": draw(len(weight))}


LAYERS: dict[str, tuple[Callable[[Draw, Tensor], dict[str, Tensor]], type[nn.Module]]] = {
    "DoRA": (dora, nn.Linear),
    "DoRA of a convolution": (dora, nn.Conv2d),
    "Tucker": (tucker, nn.Conv2d),
    "LoHa": (loha, nn.Linear),
    "LoHa of a convolution": (loha, nn.Conv2d),
    "LoHa Tucker": (loha_tucker, nn.Conv2d),
    "LoKr": (lokr, nn.Linear),
    "LoKr of a convolution": (lokr, nn.Conv2d),
    "LoKr full": (lokr_full, nn.Linear),
    "LoKr both": (lokr_both, nn.Linear),
    "LoKr Tucker": (lokr_tucker, nn.Conv2d),
    "norm": (norm, nn.GroupNorm),
    "full": (full, nn.Conv2d),
}
"kind -> (its tensors for a layer's weight, the layers to put it on)"

TEXT = {"LoHa": loha, "DoRA": dora}


def normal(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.3 * torch.randn(*shape, generator=generator)


def layers_of(network: Any, kind: type[nn.Module]) -> dict[str, Any]:
    """The layers of a U-Net of one kind that LyCORIS adapts: those of attentions and residual blocks."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, kind) and (".attn" in path or ".conv1" in path or ".conv2" in path or ".norm1" in path)
    }


def lycoris_file(network: Any, kind: str, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """A file of one kind on all layers of its type."""
    make, layer_type = LAYERS[kind]
    draw, file = normal(3), {}
    for path, module in layers_of(network, layer_type).items():
        stem = f"{prefix}{path.replace('.', '_')}"
        file |= {f"{stem}.{end}": value for end, value in make(draw, module.weight.detach()).items()}
    return file
