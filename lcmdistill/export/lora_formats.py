"""LoRA files: kohya (ComfyUI, A1111, diffusers), diffusers' own, and peft's; written with their true alpha.

A LoRA here is a mapping from a layer's path in the U-Net to its LoraLayer.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.export.single_file import architecture_of, file_header, layout_of
from lcmdistill.sampling.student_pipeline import trained_steps
from lcmdistill.students.lora import LoraLayer
from lcmdistill.students.lora_files import (
    DIFFUSERS_LORA,
    ORIGINAL_STEPS_KEY,
    SCHEDULER_KEY,
    Lora,
    alpha_of,
    kohya_tensors,
    rank_of,
)
from lcmdistill.teachers.naming import public_name
from lcmdistill.teachers.registry import family_of


def peft_tensors(lora: Lora, prefix: str) -> dict[str, Tensor]:
    """`<prefix>.<path>.lora_A.weight | lora_B.weight` in fp32: "unet" is diffusers' prefix, "base_model.model" peft's."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.items():
        tensors[f"{prefix}.{path}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"{prefix}.{path}.lora_B.weight"] = layer.up.contiguous()
    return tensors


def adapter_config(lora: Lora) -> dict[str, Any]:
    """peft's LoraConfig as plain values; target_modules is a list of whole paths, so that nothing else can match."""
    return {
        "peft_type": "LORA",
        "r": rank_of(lora),
        "lora_alpha": alpha_of(lora),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(lora),
        "rank_pattern": {},  # diffusers 0.35 asks for it
    }


def header(lora: Lora, config: RunConfig, title: str, base_pipeline: Any) -> dict[str, str]:
    """The header that UIs show: base model, rank, alpha, omega in both conventions, and how the file is used.

    config: the run's; base_pipeline: the teacher's, which tells the architecture.
    """
    base, side = public_name(config.teacher.model), config.data.resolution
    layout, prediction_type = layout_of(base_pipeline), base_pipeline.scheduler.config.prediction_type
    architecture = architecture_of(base_pipeline, prediction_type) or architecture_of(base_pipeline, "epsilon")
    version = layout.base_versions.get(prediction_type, layout.base_versions["epsilon"])
    method, omegas = config.objective.info, omega_range(config)
    omega = (
        f"{omegas.omega} (guidance scale {omegas.scale}, which is omega + 1)" if omegas else "its guidance left free"
    )
    skip, k = config.teacher.clip_skip, getattr(config.objective, "skip", 1)
    cfg = "CFG 1 (up to 2)" if omegas else "CFG 1 to 4, negative prompts act"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        **file_header(config, title),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.description": f"{method.lora_title} {method.relation} {base} with {omega}",
        "modelspec.usage_hint": f"{method.sampler} sampler, 4 steps (2 to 8), {cfg}, LoRA weight 1",
        "modelspec.tags": f"{method.sampler.lower()},{method.lora_title.lower().replace(' ', '-')},lcmdistill",
        "modelspec.prediction_type": prediction_type.removesuffix("_prediction"),
        **sampling_header(config, base_pipeline),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank_of(lora)),
        "ss_network_alpha": f"{alpha_of(lora):g}",
        "ss_base_model_version": version,
        "ss_v2": str(layout.is_v2),  # by which A1111 tells the two apart
        "ss_sd_model_name": base,
        "ss_resolution": f"({side}, {side})",
        "ss_output_name": title,
        "ss_steps": str(config.optim.max_train_steps),
        "ss_learning_rate": str(config.optim.learning_rate),
        "ss_seed": str(config.run.seed),
        **({"ss_clip_skip": str(family_of(base_pipeline).a1111_clip_skip(skip))} if skip else {}),
        "ss_mixed_precision": str(config.run.precision),
        "ss_training_comment": f"{method.lora_title}, k = {k}, {omegas.omega if omegas else omega}",
    }


def sampling_header(config: RunConfig, base_pipeline: Any) -> dict[str, str]:
    """Return the header strings that name the scheduler of a LoRA and the number of time steps it was trained at.

    Args:
        config: The run's settings.
        base_pipeline: A pipeline with the teacher's number of time steps.
    """
    count = base_pipeline.scheduler.config.num_train_timesteps
    return {
        SCHEDULER_KEY: config.objective.info.scheduler,
        ORIGINAL_STEPS_KEY: str(trained_steps(count, config.objective)),
    }


def write_kohya(lora: Lora, path: Path, metadata: Mapping[str, str], dtype: torch.dtype = torch.float16) -> None:
    """One file for ComfyUI, A1111 and diffusers."""
    save_file(kohya_tensors(lora, dtype), path, metadata=dict(metadata))


def write_diffusers_lora(lora: Lora, folder: Path, metadata: Mapping[str, str]) -> None:
    """`pytorch_lora_weights.safetensors` with the adapter's metadata, without which diffusers loses alpha."""
    adapter = {f"unet.{key}": value for key, value in adapter_config(lora).items()}
    described = {**metadata, "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    save_file(peft_tensors(lora, "unet"), folder / DIFFUSERS_LORA, metadata=described)


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


def from_checkpoint(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, LoraLayer]:
    """A checkpoint's "path.lora_A", "path.lora_B" as a Lora."""
    paths = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    plain = {key: tensor.detach().float().cpu() for key, tensor in tensors.items()}
    return {path: LoraLayer(plain[f"{path}.lora_A"], plain[f"{path}.lora_B"], alpha) for path in paths}
