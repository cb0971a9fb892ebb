"""`run.compile`: networks compiled block by block, where the run is long enough to pay for it."""

from collections.abc import Iterator

import torch
from torch import nn

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
"what networks repeat: of one class and shape, each is compiled once"

PAYS_FROM = 2000
"optimiser steps; fewer are over before the minutes of compilation have come back"


def should_compile(wish: str, device: torch.device, steps: int, shapes: int = 1, *, adapter: bool = False) -> bool:
    """Whether to compile. wish: auto, on or off; steps: optimiser steps of the run; shapes: of latents, each of which is
    compiled for and has its share of the steps; adapter: whether a LoRA is trained.

    auto never does on a CPU, where the compiler takes minutes and gains little, nor an adapter, whose many small layers take it
    longest.
    """
    worth_it = device.type == "cuda" and not adapter and steps >= PAYS_FROM * shapes
    return wish == "on" or (wish == "auto" and worth_it)


def compile_blocks(network: nn.Module, shapes: int = 1) -> None:
    """Compile a network's blocks in place, for the shapes that they meet first; parameters keep their names.

    shapes: how many kinds of latents there are.

    Each is a graph of its own, so that the first of a kind is compiled and the others are found in the cache.
    """
    import torch._dynamo  # more than a second, of every start

    # Widths, resolutions, and with or without gradients: all are variants of one block, and no more than 8 would be kept.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64 * shapes)
    for block in dict.fromkeys(_blocks(network)):  # adapters share a network
        block.compile(dynamic=False)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.children():
        # What is around a single transformer block, a norm and two projections, fuses with it.
        if type(module).__name__ in BLOCKS or len(getattr(module, "transformer_blocks", ())) == 1:
            yield module
        else:
            yield from _blocks(module)
