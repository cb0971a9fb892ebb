"""Write the LoRA of a run, {component: LoRA}, in the layouts of kohya, diffusers and peft.

A LoRA is a mapping from a layer's path in the component to its LoraLayer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.students.lora_files import alpha_of, rank_of
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.lora.files import Lora, kohya_tensors
from lcmdistill.teachers.lora.fuse import concatenated


def peft_tensors(lora: Lora, prefix: str) -> dict[str, Tensor]:
    """Return `<prefix>.<path>.lora_A.weight | lora_B.weight` in fp32, under diffusers' or peft's prefix."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.items():
        tensors[f"{prefix}.{path}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"{prefix}.{path}.lora_B.weight"] = layer.up.contiguous()
    return tensors


def adapter_config(lora: Lora) -> dict[str, Any]:
    """Return peft's LoraConfig as plain values; target_modules lists whole paths, so that no other layer matches."""
    return {
        "peft_type": "LORA",
        "r": rank_of(lora),
        "lora_alpha": alpha_of(lora),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(lora),
        "rank_pattern": {},  # diffusers 0.35 asks for it
    }


def write_kohya(
    parts: Mapping[str, Lora],
    path: Path,
    metadata: Mapping[str, str],
    family: TeacherFamily,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write one file for ComfyUI, A1111 and diffusers.

    Args:
        parts: {component: LoRA}.
        path: The file to write.
        metadata: Its header.
        family: The family of the base.
        dtype: The dtype of the tensors.
    """
    tensors = kohya_tensors(parts[family.network], dtype)
    prefixes = {part: prefix for prefix, part in family.lora_prefixes.items() if prefix.endswith("_")}
    for part, lora in _text_encoders(parts, family).items():
        tensors |= kohya_tensors(lora, dtype, prefixes[part])
    save_file(tensors, path, metadata=dict(metadata))


def _text_encoders(parts: Mapping[str, Lora], family: TeacherFamily) -> dict[str, Lora]:
    """Return the LoRAs of text encoders, whose layers are in `text_model` in every file, whatever transformers calls them."""
    return {
        part: {f"text_model.{path.removeprefix('text_model.')}": layer for path, layer in lora.items()}
        for part, lora in parts.items()
        if part != family.network
    }


def write_diffusers_lora(
    parts: Mapping[str, Lora], path: Path, metadata: Mapping[str, str], family: TeacherFamily
) -> None:
    """Write a file for diffusers with the adapters' metadata, without which diffusers loses alpha.

    Of a transformer ComfyUI reads these keys, too, but not the metadata: alpha / rank is multiplied into the weights.

    Args:
        parts: {component: LoRA}.
        path: The file.
        metadata: Its header.
        family: The family of the base.
    """
    tensors, adapter = dict[str, Tensor](), dict[str, Any]()
    for part, lora in {family.network: parts[family.network], **_text_encoders(parts, family)}.items():
        layers = lora if family.network == "unet" else {key: concatenated([layer]) for key, layer in lora.items()}
        tensors |= peft_tensors(layers, part)
        # By their ends, which some versions of transformers lack `text_model` in front of.
        ends = {key.removeprefix("text_model."): layer for key, layer in layers.items()}
        adapter |= {f"{part}.{key}": value for key, value in adapter_config(ends).items()}
    extended = {**metadata, "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    save_file(tensors, path, metadata=extended)


def write_peft(lora: Lora, folder: Path, base_model: str, sampling: Mapping[str, str]) -> None:
    """Write a peft adapter's files, for `PeftModel.from_pretrained(unet, folder)`.

    Args:
        lora: The adapter.
        folder: An existing folder.
        base_model: The name of the model that the adapter belongs to.
        sampling: The result of `sampling_header`.
    """
    config = {**adapter_config(lora), "base_model_name_or_path": base_model, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    metadata = {"format": "pt", **sampling}
    save_file(peft_tensors(lora, "base_model.model"), folder / "adapter_model.safetensors", metadata=metadata)
