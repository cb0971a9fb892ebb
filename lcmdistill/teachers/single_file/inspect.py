"""What a single-file checkpoint is, told from the names and shapes of its tensors: nothing is loaded, no torch here.

The keys are those of the original programs: `model.diffusion_model.` U-Net, `first_stage_model.` VAE, and text encoders under
`cond_stage_model.` (Stable Diffusion 1 and 2) or `conditioner.embedders.` (XL).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lcmdistill.utils.errors import UsageError

UNET = "model.diffusion_model."

LAYOUTS = {
    "sdxl": ("conditioner.embedders.1.model.", "Stable Diffusion XL", "two text encoders"),
    "sd2": ("cond_stage_model.model.", "Stable Diffusion 2", "OpenCLIP's text encoder"),
    "sd1": ("cond_stage_model.transformer.", "Stable Diffusion 1", "CLIP's text encoder"),
}
"layout -> what only its keys begin with, its name, and how that is told"

LORA_DOWNS = (".lora_down.weight", ".lora_A.weight", "lora.down.weight", ".lora_linear_layer.down.weight")

LORA_ENDS = (*LORA_DOWNS, ".lora_up.weight", ".lora_B.weight", "lora.up.weight", ".lora_linear_layer.up.weight")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data. metadata: its strings; tensors: name -> (dtype, shape)."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class CheckpointInfo:
    """A single-file checkpoint. layout: a key of LAYOUTS; why: how each was told, in words."""

    layout: str
    inpaints: bool
    prediction_type: str
    zero_snr: bool
    why: str


def read_header(path: Path) -> Header:
    """The header of a safetensors file: eight bytes of length, then JSON. Raises UsageError if it is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise ValueError("its first bytes are not the length of a header")
            tree = json.loads(file.read(length))
        if not isinstance(tree, dict):
            raise ValueError("its header is no table of tensors")
        strings = tree.pop("__metadata__", None) or {}
        missing = max((each["data_offsets"][1] for each in tree.values()), default=0) + 8 + length - path.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing:,} bytes are missing at its end; download or copy it again")
        return Header(strings, {name: (each["dtype"], tuple(each["shape"])) for name, each in tree.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no safetensors file, or a truncated one: {error}") from error


def is_lora(header: Header) -> bool:
    """Whether a file holds low-rank updates instead of a model."""
    return any(name.endswith(LORA_ENDS) for name in header.tensors)


def inspect_checkpoint(path: Path, header: Header) -> CheckpointInfo:
    """Family, prediction type and schedule of a checkpoint. Raises UsageError, saying what it is instead, if it is unknown."""
    names = header.tensors
    if is_lora(header):
        raise UsageError(f"{path} is a LoRA; give the checkpoint that it belongs to")
    if not any(name.startswith(f"{UNET}input_blocks.") for name in names):
        raise UsageError(
            f"{path} holds no Stable Diffusion U-Net ({UNET}input_blocks...); give a whole checkpoint of Stable Diffusion 1, 2 "
            "or XL, or a diffusers folder"
        )
    layout = next((key for key, (start, _, _) in LAYOUTS.items() if any(n.startswith(start) for n in names)), None)
    if layout is None:
        refiner = any(name.startswith("conditioner.embedders.0.model.") for name in names)
        what = "is SDXL's refiner" if refiner else "holds no text encoder that is known here"
        raise UsageError(f"{path} {what}; give a whole checkpoint of Stable Diffusion 1, 2 or XL base")
    if not any(name.startswith("first_stage_model.") for name in names):
        raise UsageError(f"{path} holds no VAE (first_stage_model...); give a checkpoint with its VAE in it")
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        raise UsageError(f"{path} was trained in EDM's frame, which no teacher with a VAE is supported in yet")
    channels = names.get(f"{UNET}input_blocks.0.0.weight", ("", (0, 0)))[1][1]
    if channels not in (4, 9):
        raise UsageError(f"{path}: its U-Net takes {channels} channels; supported are 4, and 9 (inpainting)")
    _, name, told = LAYOUTS[layout]
    prediction_type, how = _prediction_type(header, layout, channels == 9)
    width = next((s[1] for n, (_, s) in names.items() if n.endswith("attn2.to_k.weight")), 0)
    parts = [f"{name}{' inpainting' * (channels == 9)} ({told}, cross-attention {width} wide, {channels} channels)"]
    parts.append(f"{prediction_type} ({how})")
    zero_snr = "ztsnr" in names
    parts += ["zero-terminal SNR (it holds a ztsnr marker)"] if zero_snr else []
    return CheckpointInfo(layout, channels == 9, prediction_type, zero_snr, ", ".join(parts))


def _prediction_type(header: Header, layout: str, inpaints: bool) -> tuple[str, str]:
    """A checkpoint's prediction type, and how it is told."""
    said = header.metadata.get("modelspec.prediction_type", "")
    architecture = header.metadata.get("modelspec.architecture", "")
    if "v_pred" in header.tensors:
        return "v_prediction", "it holds a v_pred marker"
    if said in ("v", "v_prediction", "epsilon"):
        return "epsilon" if said == "epsilon" else "v_prediction", "its header says so"
    if "-768-v" in architecture or "v2-512" in architecture:
        return "v_prediction" if "-768-v" in architecture else "epsilon", f"its header says {architecture}"
    if layout == "sd2" and not inpaints:
        return "v_prediction", "guessed: most of its kind are; a 512 px base needs --prediction-type epsilon"
    return "epsilon", "nothing in it says otherwise; if it is v, use --prediction-type v_prediction"
