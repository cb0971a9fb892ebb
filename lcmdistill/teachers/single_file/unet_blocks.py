"""The blocks of a U-Net, counted from the keys of a checkpoint: SSD-1B, Segmind Vega and other models with fewer than SDXL."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lcmdistill.teachers.single_file.inspect import UnetKeys

Level = list[int]
"the depth of the attention after each residual block of a level; 0 for none"


def with_counted_blocks(config: Mapping[str, Any], names: Collection[str], keys: UnetKeys) -> dict[str, Any]:
    """Return a diffusers U-Net config with the blocks that a file has; the config itself if the file has its blocks.

    Args:
        config: The config of a published model of the same layout.
        names: The keys of the file.
        keys: How the keys of its U-Net are written.
    """
    bare = {name.removeprefix(keys.prefix) for name in names if name.startswith(keys.prefix)}
    if keys.is_diffusers:
        down, up = _diffusers_levels(bare, "down_blocks"), _diffusers_levels(bare, "up_blocks")
        middle = [_count(bare, "mid_block.resnets.") + _count(bare, "mid_block.attentions.")]
        middle.append(_count(bare, "mid_block.attentions.0.transformer_blocks."))
    else:
        down, up = _levels(bare, "input_blocks"), _levels(bare, "output_blocks")
        middle = [_count(bare, "middle_block."), _count(bare, "middle_block.1.transformer_blocks.")]
    if len(down) != len(config["down_block_types"]) or [down, up, middle] == _blocks_of(config):
        return dict(config)
    mid_types = {0: None, 1: "UNetMidBlock2D"}
    return {
        **config,
        "layers_per_block": [len(level) for level in down],
        "down_block_types": [f"{'CrossAttn' * any(level)}DownBlock2D" for level in down],
        "up_block_types": [f"{'CrossAttn' * any(level)}UpBlock2D" for level in up],
        "transformer_layers_per_block": [_plain(level) for level in down],
        "reverse_transformer_layers_per_block": [_plain(level) for level in up],
        "mid_block_type": mid_types.get(middle[0], "UNetMidBlock2DCrossAttn"),
    }


def _levels(names: Collection[str], half: str) -> list[Level]:
    """Return the levels of a half of a U-Net. A level ends where the resolution changes."""
    levels, level = [], Level()
    numbers = {int(match[1]) for name in names if (match := re.match(rf"{half}\.(\d+)\.", name))}
    for number in sorted(numbers):
        block = f"{half}.{number}"
        if f"{block}.0.in_layers.0.weight" in names:
            level.append(_count(names, f"{block}.1.transformer_blocks."))
        if any(re.match(rf"{re.escape(block)}\.(0\.op|[12]\.conv)\.", name) for name in names):
            levels, level = [*levels, level], Level()
    return [*levels, level]


def _diffusers_levels(names: Collection[str], half: str) -> list[Level]:
    """Return the levels of a half of a U-Net by diffusers' names."""
    return [
        [
            _count(names, f"{half}.{level}.attentions.{layer}.transformer_blocks.")
            for layer in range(_count(names, f"{half}.{level}.resnets."))
        ]
        for level in range(_count(names, f"{half}."))
    ]


def _count(names: Collection[str], start: str) -> int:
    """Return the number of different next parts of the names that begin so, such as the blocks below a level."""
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


def _blocks_of(config: Mapping[str, Any]) -> list[Any]:
    """Return the levels of both halves, and the number of parts and the depth of the middle, of a config."""
    kinds, ups = config["down_block_types"], config["up_block_types"]
    layers, depths = (
        [value] * len(kinds) if isinstance(value := config.get(key, 1), int) else list(value)
        for key in ("layers_per_block", "transformer_layers_per_block")
    )
    reverse = config.get("reverse_transformer_layers_per_block") or depths[::-1]

    def level(kind: str, depth: int | Sequence[int], count: int) -> Level:
        full = [depth] * count if isinstance(depth, int) else list(depth)
        return full if kind.startswith("CrossAttn") else [0] * count

    down = [level(*each) for each in zip(kinds, depths, layers, strict=True)]
    up = [level(kind, depth, count + 1) for kind, depth, count in zip(ups, reverse, layers[::-1], strict=True)]
    middle = {None: [0, 0], "UNetMidBlock2D": [1, 0]}
    last = depths[-1] if isinstance(depths[-1], int) else depths[-1][0]
    return [down, up, middle.get(config.get("mid_block_type", "UNetMidBlock2DCrossAttn"), [3, last])]


def _plain(level: Level) -> int | Level:
    """Return one number for a level with equal depths; 1, which has no effect, for a level without attention."""
    return (level[0] or 1) if len(set(level)) == 1 else level
