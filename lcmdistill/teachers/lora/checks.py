"""Whether the tensors of a LoRA file are sound, and fit a model. What would be lost is refused with its key."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.lora.kinds import ENDS, ORIGINAL_NAMES, flat_path, other_kinds_of
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.teachers.single_file.inspect import Header, holds_network, is_lora
from lcmdistill.teachers.single_file.other_files import other_file
from lcmdistill.teachers.single_file.sd_keys import original_key, unet_places
from lcmdistill.utils.errors import UsageError

_DOWN_UP = (("down", 1), ("up", 0))

SUFFIXES = (
    (".lora_down.weight", 1),
    (".lora_up.weight", 0),
    (".lora_A.weight", 1),
    (".lora_B.weight", 0),
    # diffusers before peft, for U-Nets and for text encoders; ".down.weight" ends processor.to_q_lora
    *((f"{start}.{part}.weight", axis) for start in (".lora", ".lora_linear_layer", "") for part, axis in _DOWN_UP),
)
"the ends of keys of low-rank matrices, and the axis of each that belongs to the layer"

_WEIGHT_ENDS = (*(suffix for suffix, _ in SUFFIXES), *(f".{end}" for end in ENDS - {"alpha"}))
"the ends of keys of weights in all layouts"


def check_type(key: str, value: Tensor, label: str) -> None:
    """Raise UsageError for a tensor that is not of the kind of number that its key stands for."""
    if key.endswith(".alpha"):
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            raise UsageError(f"{label} is damaged: {key} is not one number; download or export it again")
        if value == 0:
            raise UsageError(
                f"{label} has an alpha of 0, {key}, which some programs read as no effect and others as the rank; export "
                "it again with its alpha"
            )
    elif key.endswith(_WEIGHT_ENDS) and not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise UsageError(f"{label} holds weights of the type {kind}, such as {key}; export it in fp16 or fp32")


def twice_error(label: str, key: str) -> UsageError:
    """Return the error for a file in which two keys name one tensor."""
    return UsageError(f"{label} holds a layer twice, under two names, such as {key}; export it again with one of them")


def check_fit(pipeline: Any, family: TeacherFamily, weights: Mapping[str, Tensor], label: str) -> None:
    """Raise UsageError unless the model has every layer of a LoRA, with the same input and output widths."""
    prefixes = known_prefixes(family)
    widths = {part: _widths(getattr(pipeline, part, None)) for part in set(prefixes.values())}
    absent, mismatched = dict[tuple[str, str], str](), dict[tuple[str, str], str]()
    unknown, halves = list[str](), dict[tuple[str, str], dict[int, tuple[int, str]]]()
    alphas: dict[str, tuple[str, str]] = {}
    for key, value in weights.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        suffix, axis = next(((s, axis) for s, axis in SUFFIXES if key.endswith(s)), ("", 0))
        if prefix and key.endswith(".alpha"):
            alphas[key] = prefixes[prefix], flat_path(key.removeprefix(prefix).removesuffix(".alpha"))
            continue
        if not prefix or not suffix:
            unknown.append(key)
            continue
        part, path = prefixes[prefix], flat_path(key.removeprefix(prefix).removesuffix(suffix))
        matrices = halves.setdefault((part, path), {})
        if axis in matrices:
            raise twice_error(label, key)
        if value.ndim < 2:
            raise UsageError(f"{label} is damaged: {key} has {value.ndim} dimensions, and a matrix has 2 or more")
        matrices[axis] = value.shape[1 - axis], key
        if path not in widths[part]:
            absent.setdefault((part, path), key)
        elif value.shape[axis] != widths[part][path][axis]:
            mismatched.setdefault((part, path), key)
    unknown += [key for key, layer in alphas.items() if layer not in halves]
    is_comfy = any("diffusion_model." in key for key in unknown)
    kind = " with ComfyUI's model keys" if is_comfy else "".join(f" of {kind}" for kind in other_kinds_of(unknown)[:1])
    if peft := next((key for key in unknown if key.startswith("base_model.model.")), None):
        raise UsageError(
            f"{label} has peft's keys, such as {peft}, and no adapter_config.json next to it, which has the scale of its "
            "layers; pass the adapter's whole folder"
        )
    if not halves:
        header = Header({}, {key: ("", tuple(value.shape)) for key, value in weights.items()})
        if holds_network(header):
            raise UsageError(f"{label} is a checkpoint and no LoRA; pass it as the model instead")
        if not is_lora(header) and (other := other_file(header.tensors)) is not None:
            raise UsageError(f"{label} {other.text}")
        found = f"; it has tensors{kind} such as {unknown[0]}" if unknown else ""
        raise UsageError(
            f"{label} holds no LoRA in a known layout (kohya, diffusers or peft keys){found}; merge it into its base, or "
            "export it as a plain LoRA"
        )
    if unknown:
        raise UsageError(
            f"{label} holds {len(unknown)} tensors{kind} beyond plain LoRA layers, such as {unknown[0]}; without them "
            "it would generate other images: merge it into its base, or export it as a plain LoRA"
        )
    if single := [path for (_, path), axes in halves.items() if len(axes) == 1]:
        raise UsageError(
            f"{label} is damaged: {len(single)} of its layers have one matrix instead of two, such as {single[0]}"
        )
    for ranks in halves.values():
        if ranks[0][0] != ranks[1][0] and not (absent or mismatched):
            raise UsageError(
                f"{label} is damaged: {ranks[1][1]} has the rank {ranks[1][0]}, and {ranks[0][1]} has {ranks[0][0]}; "
                "download or export it again"
            )
    if absent or mismatched:
        first = next(iter((absent or mismatched).values()))
        if family.network == "transformer" and ORIGINAL_NAMES in other_kinds_of(absent.values()):
            raise UsageError(
                f"{label} has {ORIGINAL_NAMES}, such as {first}, and only those of diffusers are read; use a file with "
                "diffusers' keys, or merge it into its base"
            )
        raise UsageError(
            f"{label} does not fit this model: {len(absent)} of its layers are absent and {len(mismatched)} have another "
            f"width, such as {first}; it was made for another base"
        )


def known_prefixes(family: TeacherFamily) -> dict[str, str]:
    """Return {prefix of a key: the component it belongs to} of a family, and of the others where they differ from it.

    Programs read SDXL's prefix of the first text encoder in files of SD 1, too. Layers of a component that the model lacks
    are reported as such.
    """
    prefixes = {prefix: part for each in FAMILIES.values() for prefix, part in each.lora_prefixes.items()}
    return prefixes | dict(family.lora_prefixes)


def named_layers(model: Any) -> dict[str, tuple[str, Any]]:
    """Return {name: (path, module)} of the layers of a network or text encoder, adapted or not; {} for None.

    Names are paths with _, also those of the original layout of a U-Net.
    """
    modules = [] if model is None else model.named_modules()
    named = {path.removesuffix(".base_layer"): module for path, module in modules if _has_weight(module)}
    layers = {flat_path(path): (path, module) for path, module in named.items()}
    config: Any = getattr(model, "config", {})
    if "down_block_types" in config:
        places = unet_places(config)
        for path, module in named.items():
            if original := original_key(f"{path}.weight", places):
                layers[original.removesuffix(".weight").replace(".", "_")] = path, module
    return layers


def _has_weight(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), torch.nn.Parameter)  # a norm may have none


def _widths(model: Any) -> dict[str, Sequence[int]]:
    """Return {name: its weight's shape} of the layers of a network or text encoder."""
    return {name: module.weight.shape for name, (_, module) in named_layers(model).items()}
