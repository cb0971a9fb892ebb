"""The keys of LoRA files: the kinds beyond plain LoRA, and the names of layers. Nothing here imports torch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

KINDS = {
    "lora": ("lora_up.weight", "lora_down.weight"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "DoRA": ("dora_scale",),
    "Tucker": ("lora_mid.weight",),
    "norms": ("w_norm", "b_norm"),
    "full differences": ("diff", "diff_b"),
}
"what the tensors of a layer are called, by kind; several kinds may act on one layer"

ORIGINAL_NAMES = "a transformer's original layer names"
"what kohya's files for FLUX.1 and Stable Diffusion 3 have, whose layers are not those of diffusers"

OTHER_KINDS = {
    "bundle_emb": "textual inversions",
    "oft_": "OFT",
    ".on_input": "(IA)^3",
    ".a1.weight": "GLoRA",
    "lora_unet_double_blocks_": ORIGINAL_NAMES,
    "lora_unet_single_blocks_": ORIGINAL_NAMES,
    "lora_unet_joint_blocks_": ORIGINAL_NAMES,
}
"{part of a key: the kind of adapter}, of kinds that cannot be loaded"

FAMILY_KEY = "lcmdistill.family"
"the header key with the family of a LoRA's base, where `ss_base_model_version` has no word for it"

MAGNITUDE = ".lora_magnitude_vector"
"the end of the keys of DoRA's magnitudes in diffusers' and peft's files"

ENDS = {"alpha", *(part for parts in KINDS.values() for part in parts)}


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return the kinds beyond plain LoRA in a file, by its keys."""
    names = list(names)
    return [
        kind
        for kind, parts in KINDS.items()
        if kind != "lora"
        and any(
            name.endswith(tuple(f".{part}" for part in parts)) or (kind == "DoRA" and is_magnitude(name))
            for name in names
        )
    ]


def is_magnitude(name: str) -> bool:
    """Return whether a key names the magnitudes of a DoRA layer, as diffusers and peft store them."""
    return name.removesuffix(".weight").endswith(MAGNITUDE)


def other_kinds_of(names: Iterable[str]) -> list[str]:
    """Return the kinds of adapters in a file that cannot be loaded, by its keys."""
    names = list(names)
    return list(dict.fromkeys(kind for part, kind in OTHER_KINDS.items() if any(part in name for name in names)))


def split_key(key: str) -> tuple[str, str]:
    """Return a layer's name and the end of a key; the end is "" if it is unknown."""
    stem, _, end = key.partition(".")
    return stem, end if end in ENDS else ""


def flat_path(path: str) -> str:
    """Return a path as kohya writes it.

    It lacks the `text_model` that some versions of transformers leave out, and the attention processors of diffusers in 2023.
    """
    return re.sub(r"_processor_(to_\w+)_lora$", _without_processor, path.replace(".", "_")).removeprefix("text_model_")


def _without_processor(match: re.Match[str]) -> str:
    return f"_{match[1]}_0" if match[1] == "to_out" else f"_{match[1]}"


def adapter_settings(header: Mapping[str, str], label: str) -> dict[str, Any]:
    """Return the settings of an adapter, such as its alphas, that diffusers writes into a header; {} without any.

    Args:
        header: The file's header.
        label: What messages call the file.

    Raises:
        UsageError: They are damaged.
    """
    try:
        settings = parse_json(header.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise UsageError(f"{label} has damaged adapter settings in its header ({error}); export it again") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{label} has adapter settings in its header that are not a JSON object; export it again")
    return settings
