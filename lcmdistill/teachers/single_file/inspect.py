"""Recognize single-file checkpoints by the names and shapes of their tensors, without loading them or importing torch.

The keys are those of the original programs: `model.diffusion_model.` for the U-Net, `first_stage_model.` for the VAE, and
`cond_stage_model.` (Stable Diffusion 1 and 2) or `conditioner.embedders.` (XL) for the text encoders.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lcmdistill.teachers.family import SingleFileLayout, TeacherFamily
from lcmdistill.teachers.registry import single_file_layouts
from lcmdistill.utils.errors import UsageError

UNET = "model.diffusion_model."

REFINER = "conditioner.embedders.0.model."
"what the text encoder's keys of SDXL's refiner begin with"

LORA_DOWNS = (".lora_down.weight", ".lora_A.weight", "lora.down.weight", ".lora_linear_layer.down.weight")

LORA_ENDS = (*LORA_DOWNS, ".lora_up.weight", ".lora_B.weight", "lora.up.weight", ".lora_linear_layer.up.weight")


@dataclass(frozen=True)
class Header:
    """What a safetensors file states before its data.

    Attributes:
        metadata: Its strings.
        tensors: {name: (dtype, shape)}.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a single-file checkpoint is.

    Attributes:
        family: The family that opens it.
        layout: The layout of its keys.
        prediction_type: What its network predicts.
        zero_snr: Whether its schedule ends in pure noise.
        why: How each of these was recognized, in words.
    """

    family: TeacherFamily
    layout: SingleFileLayout
    prediction_type: str
    zero_snr: bool
    why: str


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file: eight bytes of length, then JSON.

    Raises:
        UsageError: The file is not a complete safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise ValueError("its first bytes are not the length of a header")
            tree = json.loads(file.read(length))
        if not isinstance(tree, dict):
            raise ValueError("its header is not a table of tensors")
        strings = tree.pop("__metadata__", None) or {}
        missing = max((each["data_offsets"][1] for each in tree.values()), default=0) + 8 + length - path.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing:,} bytes are missing at its end; download or copy it again")
        return Header(strings, {name: (each["dtype"], tuple(each["shape"])) for name, each in tree.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a safetensors file, or it is truncated: {error}") from error


def is_lora(header: Header) -> bool:
    """Return whether a file holds low-rank updates instead of a model."""
    return any(name.endswith(LORA_ENDS) for name in header.tensors)


def inspect_checkpoint(path: Path, header: Header) -> CheckpointInfo:
    """Return the family, the prediction type and the schedule of a checkpoint.

    Raises:
        UsageError: The file is not a known checkpoint; the message states what it is instead.
    """
    names = header.tensors
    if is_lora(header):
        raise UsageError(f"{path} is a LoRA; specify the checkpoint that it belongs to")
    if not any(name.startswith(f"{UNET}input_blocks.") for name in names):
        raise UsageError(
            f"{path} holds no Stable Diffusion U-Net ({UNET}input_blocks...); use a whole checkpoint of Stable Diffusion 1, 2 "
            "or XL, or a diffusers folder"
        )
    matches = [(family, layout) for family, layout in _by_marker() if any(n.startswith(layout.marker) for n in names)]
    if not matches:
        what = "is SDXL's refiner" if any(name.startswith(REFINER) for name in names) else "holds no known text encoder"
        raise UsageError(f"{path} {what}; use a whole checkpoint of Stable Diffusion 1, 2 or XL base")
    if not any(name.startswith("first_stage_model.") for name in names):
        raise UsageError(f"{path} holds no VAE (first_stage_model...); use a checkpoint that includes its VAE")
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        raise UsageError(f"{path} was trained on EDM's noise levels, which are not supported for teachers with a VAE")
    channels = names.get(f"{UNET}input_blocks.0.0.weight", ("", (0, 0)))[1][1]
    match = next(((family, layout) for family, layout in matches if family.input_channels == channels), None)
    if match is None:
        raise UsageError(f"{path}: its U-Net takes {channels} channels; supported are 4, and 9 (inpainting)")
    family, layout = match
    prediction_type, reason = _prediction_type(header, layout)
    width = next((s[1] for n, (_, s) in names.items() if n.endswith("attn2.to_k.weight")), 0)
    name = f"{layout.title}{' inpainting' * family.takes_mask}"
    parts = [f"{name} ({layout.text_title}, cross-attention {width} wide, {channels} channels)"]
    parts.append(f"{prediction_type} ({reason})")
    zero_snr = "ztsnr" in names
    parts += ["zero-terminal SNR (it holds a ztsnr marker)"] if zero_snr else []
    return CheckpointInfo(family, layout, prediction_type, zero_snr, ", ".join(parts))


def _by_marker() -> list[tuple[TeacherFamily, SingleFileLayout]]:
    """Return families and layouts, those with the most text encoders first: a file of two may also hold one's keys."""
    return sorted(single_file_layouts(), key=lambda pair: -len(pair[1].text_encoders))


def _prediction_type(header: Header, layout: SingleFileLayout) -> tuple[str, str]:
    """Return a checkpoint's prediction type, and how it was recognized."""
    stated = header.metadata.get("modelspec.prediction_type", "")
    architecture = header.metadata.get("modelspec.architecture", "")
    if "v_pred" in header.tensors:
        return "v_prediction", "it holds a v_pred marker"
    if stated in ("v", "v_prediction", "epsilon"):
        return "epsilon" if stated == "epsilon" else "v_prediction", "its header says so"
    for mark, prediction_type in layout.prediction_marks.items():
        if mark in architecture:
            return prediction_type, f"its header says {architecture}"
    if layout.default_prediction == "v_prediction":
        return (
            "v_prediction",
            "assumed, as most models of its kind predict v; a 512 px base needs --prediction-type epsilon",
        )
    return "epsilon", "not specified in the file; if it predicts v, use --prediction-type v_prediction"
