"""`run.compile`: compile networks block by block, where the run is long enough to repay the compilation."""

from collections.abc import Iterator

import torch
from torch import nn

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
"classes of the blocks that networks repeat: blocks of one class and shape share a compilation"

REPAID_AFTER = 2000
"optimizer steps, per shape of latents, after which faster steps have made up for the minutes of compilation"


def should_compile(choice: str, device: torch.device, steps: int, shapes: int = 1, *, adapter: bool = False) -> bool:
    """Return whether to compile.

    auto does not compile on a CPU, where the compiler takes minutes and gains little, nor for a LoRA, whose many small layers
    take it longest.

    Args:
        choice: auto, on or off.
        device: The device of the run.
        steps: Optimizer steps of the run.
        shapes: Number of shapes of latents. Each is compiled for, and has its share of the steps.
        adapter: Whether a LoRA is trained.
    """
    repaid = device.type == "cuda" and not adapter and steps >= REPAID_AFTER * shapes
    return choice == "on" or (choice == "auto" and repaid)


def compile_blocks(network: nn.Module, shapes: int = 1) -> None:
    """Compile the blocks of a network in place, for the shapes that they meet first. Parameters keep their names.

    Each block is a graph of its own: the first of a kind is compiled, and the others are found in the cache.

    Args:
        network: The network, or several in one module.
        shapes: Number of shapes of latents.
    """
    import torch._dynamo  # takes more than a second, which other commands need not spend

    # Widths, resolutions, and with or without gradients: all are variants of one block, and by default only 8 are kept.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64 * shapes)
    for block in dict.fromkeys(repeated_blocks(network)):  # adapters share a network
        block.compile(dynamic=False)


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network that are compiled, or sharded, each on its own."""
    for module in network.children():
        # The norm and the two projections around a single transformer block fuse with it.
        if type(module).__name__ in BLOCKS or len(getattr(module, "transformer_blocks", ())) == 1:
            yield module
        else:
            yield from repeated_blocks(module)
