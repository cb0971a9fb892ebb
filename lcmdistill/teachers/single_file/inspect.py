"""Recognize single-file checkpoints by the names and shapes of their tensors, without loading them or importing torch.

The keys are those of the original programs: `model.diffusion_model.` for the U-Net, `first_stage_model.` for the VAE, and
`cond_stage_model.` (Stable Diffusion 1 and 2) or `conditioner.embedders.` (XL) for the text encoders. Files of a U-Net only may
lack the prefix, or have the keys of diffusers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmdistill.teachers.family import SingleFileLayout, TeacherFamily
from lcmdistill.teachers.registry import single_file_layouts
from lcmdistill.teachers.single_file.other_files import image_adapter, not_safetensors, other_file
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

UNET = "model.diffusion_model."

VAE = "first_stage_model."

REFINER_WIDTH = 1280
"the width of the cross-attention of SDXL's refiner"

REFINER = "conditioner.embedders.0.model."
"what the text encoder's keys of SDXL's refiner begin with"

LORA_DOWNS = (".lora_down.weight", ".lora_A.weight", "lora.down.weight", ".lora_linear_layer.down.weight")

LORA_ENDS = (*LORA_DOWNS, ".lora_up.weight", ".lora_B.weight", "lora.up.weight", ".lora_linear_layer.up.weight")

LYCORIS_ENDS = (
    *(".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".dora_scale", ".w_norm", ".diff"),
    *(".oft_blocks", ".oft_diag", ".on_input", ".a1.weight"),
)
"an end that the layers of each other kind of LoRA have"


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
class UnetKeys:
    """How the keys of a file's U-Net are written.

    Attributes:
        prefix: What precedes them.
        is_diffusers: Whether they are diffusers' names instead of the original program's.
    """

    prefix: str
    is_diffusers: bool

    def named(self, original: str, diffusers: str) -> str:
        """Return the key of one weight, given its name in both layouts."""
        return f"{self.prefix}{diffusers if self.is_diffusers else original}"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a single-file checkpoint is.

    Attributes:
        family: The family that opens it.
        layout: The layout of its keys.
        unet: How the keys of its U-Net or transformer are written.
        parts: The components of the pipeline that it holds: the network, "vae" and text encoders.
        prediction_type: What its network predicts.
        states_prediction: Whether the file itself states that.
        zero_snr: Whether its schedule ends in pure noise.
        why: How each of these was recognized, in words.
    """

    family: TeacherFamily
    layout: SingleFileLayout
    unet: UnetKeys
    parts: tuple[str, ...]
    prediction_type: str
    states_prediction: bool
    zero_snr: bool
    why: str

    @property
    def missing(self) -> tuple[str, ...]:
        """The components that the pipeline needs and the file lacks, text encoders first."""
        needed = (*self.layout.text_encoders, "vae")
        return tuple(part for part in needed if part not in (*self.parts, *self.layout.optional_encoders))


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
            tree = parse_json(file.read(length))
        if not isinstance(tree, dict):
            raise ValueError("its header is not a table of tensors")
        strings = tree.pop("__metadata__", None) or {}
        if not isinstance(strings, dict) or not all(isinstance(value, str) for value in strings.values()):
            raise ValueError("its metadata are not a table of strings")
        _check_entries(tree)
        missing = max((each["data_offsets"][1] for each in tree.values()), default=0) + 8 + length - path.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing:,} bytes are missing at its end; download or copy it again")
        return Header(strings, {name: (each["dtype"], tuple(each["shape"])) for name, each in tree.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if (other := not_safetensors(path)) is not None:
            raise UsageError(f"{path} {other.text}") from error
        raise UsageError(f"{path} is not a safetensors file, or it is truncated: {error}") from error


def _check_entries(tree: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry of a header whose values have other types than those of a tensor."""
    for name, each in tree.items():
        sizes = [*each["shape"], *each["data_offsets"]]
        is_tensor = isinstance(each["dtype"], str) and all(type(size) is int and size >= 0 for size in sizes)
        if not is_tensor or len(each["data_offsets"]) != 2:
            raise ValueError(f"its entry {name} does not describe a tensor")


def holds_network(header: Header) -> bool:
    """Return whether a file holds a network of a known layout."""
    return _unet_keys(header.tensors) is not None or _transformer(header.tensors) is not None


def is_lora(header: Header) -> bool:
    """Return whether a file holds updates of layers instead of a model."""
    return image_adapter(header.tensors) is None and any(
        name.endswith((*LORA_ENDS, *LYCORIS_ENDS)) for name in header.tensors
    )


def inspect_checkpoint(path: Path, header: Header) -> CheckpointInfo:
    """Return the family, the prediction type and the schedule of a checkpoint.

    Raises:
        UsageError: The file is not a known checkpoint; the message states what it is instead.
    """
    names = header.tensors
    if is_lora(header):
        raise UsageError(
            f"{path} is a LoRA; specify the checkpoint that it belongs to, and the LoRA as --lora (sample) or "
            "--teacher-lora (distill)"
        )
    unet = _unet_keys(names)
    if unet is None and (found := _transformer(names)) is not None:
        return found
    if unet is None and (other := other_file(names)) is not None:
        raise UsageError(f"{path} {other.text}")
    if unet is None:
        raise UsageError(
            f"{path} holds no Stable Diffusion U-Net ({UNET}input_blocks...); use a whole checkpoint of Stable Diffusion 1, 2, "
            "XL or 3, or a diffusers folder"
        )
    width = next((s[1] for n, (_, s) in names.items() if n.endswith("attn2.to_k.weight") and len(s) > 1), 0)
    layout = _layout_of(names, unet)
    if any(name.startswith(REFINER) for name in names) or (layout.takes_sizes and width == REFINER_WIDTH):
        raise UsageError(f"{path} is SDXL's refiner; use a checkpoint of Stable Diffusion 1, 2 or XL base")
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        raise UsageError(f"{path} was trained on EDM's noise levels, which are not supported for teachers with a VAE")
    first = unet.named("input_blocks.0.0.weight", "conv_in.weight")
    if len(names.get(first, ("", ()))[1]) != 4:
        raise UsageError(f"{path} lacks {first}, the first weight of its U-Net; use a complete file")
    channels = names[first][1][1]
    families = [(family, each) for family, each in single_file_layouts() if each.key == layout.key]
    match = next((each for each in families if each[0].input_channels == channels), None)
    if match is None:
        raise UsageError(f"{path}: its U-Net takes {channels} channels; supported are 4, and 9 (inpainting)")
    family, layout = match
    held = _held_parts(layout, names)
    prediction_type, reason, is_stated = _prediction_type(header, layout)
    name = f"{layout.title}{' inpainting' * family.takes_mask}"
    text = layout.text_title if set(held) & set(layout.text_encoders) else "no text encoder"
    parts = [f"{name} ({text}{', no VAE' * ('vae' not in held)}, cross-attention {width} wide, {channels} channels)"]
    parts.append(f"{prediction_type} ({reason})")
    zero_snr = "ztsnr" in names
    parts += ["zero-terminal SNR (it holds a ztsnr marker)"] if zero_snr else []
    return CheckpointInfo(
        family=family,
        layout=layout,
        unet=unet,
        parts=("unet", *held),
        prediction_type=prediction_type,
        states_prediction=is_stated,
        zero_snr=zero_snr,
        why=", ".join(parts),
    )


def _transformer(names: Mapping[str, object]) -> CheckpointInfo | None:
    """Return what a file of a transformer is; None if it holds none of a known layout."""
    for family, layout in single_file_layouts():
        for prefix in (UNET, "") if layout.network_marker else ():
            if f"{prefix}{layout.network_marker}" not in names:
                continue
            held = _held_parts(layout, names)
            encoders = [part for part in layout.text_encoders if part in held]
            text = f"{len(encoders)} text encoders" if encoders else "no text encoder"
            why = f"{layout.title} ({text}{', no VAE' * ('vae' not in held)}), flow matching"
            unused = set(encoders) & set(layout.optional_encoders)
            why += "; its T5 is used with --base only, which supplies the tokenizer" if unused else ""
            return CheckpointInfo(
                family=family,
                layout=layout,
                unet=UnetKeys(prefix, False),
                parts=(family.network, *held),
                prediction_type=layout.default_prediction,
                states_prediction=True,
                zero_snr=False,
                why=why,
            )
    return None


def _held_parts(layout: SingleFileLayout, names: Collection[str]) -> list[str]:
    """Return the components that a file holds besides the network."""
    prefixes = {"vae": VAE, **{part: prefix for part, (prefix, _) in layout.text_encoders.items()}}
    return [part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in names)]


def _unet_keys(names: Mapping[str, object]) -> UnetKeys | None:
    """Return how the keys of a U-Net are written; None if the file holds none.

    Without a prefix, a U-Net must have its second half too: files of a ControlNet have the first one.
    """
    for keys, halves in (
        (UnetKeys(UNET, False), ("input_blocks.",)),
        (UnetKeys(UNET, True), ("down_blocks.",)),
        (UnetKeys("", False), ("input_blocks.", "output_blocks.")),
        (UnetKeys("", True), ("down_blocks.", "up_blocks.")),
    ):
        if all(any(name.startswith(keys.prefix + half) for name in names) for half in halves):
            return keys
    return None


def _layout_of(names: Mapping[str, tuple[str, tuple[int, ...]]], unet: UnetKeys) -> SingleFileLayout:
    """Return the layout of a checkpoint: by its text encoders if it has them, otherwise by its U-Net."""
    layouts = {layout.key: layout for _, layout in single_file_layouts()}
    # Those with the most text encoders first: a file of two may also hold one's keys.
    for layout in sorted(layouts.values(), key=lambda each: -len(each.text_encoders)):
        if any(name.startswith(layout.marker) for name in names):
            return layout
    takes_sizes = unet.named("label_emb.0.0.weight", "add_embedding.linear_1.weight") in names
    projections = [s for n, (_, s) in names.items() if n.startswith(unet.prefix) and n.endswith(".proj_in.weight")]
    is_linear = takes_sizes or (bool(projections) and len(projections[0]) == 2)
    return next(
        layout
        for layout in layouts.values()
        if (layout.takes_sizes, layout.has_linear_projections) == (takes_sizes, is_linear)
    )


def _prediction_type(header: Header, layout: SingleFileLayout) -> tuple[str, str, bool]:
    """Return a checkpoint's prediction type, how it was recognized, and whether the file itself states it."""
    stated = header.metadata.get("modelspec.prediction_type", "")
    architecture = header.metadata.get("modelspec.architecture", "")
    if "v_pred" in header.tensors:
        return "v_prediction", "it holds a v_pred marker", True
    if stated in ("v", "v_prediction", "epsilon"):
        return "epsilon" if stated == "epsilon" else "v_prediction", "its header says so", True
    for mark, prediction_type in layout.prediction_marks.items():
        if mark in architecture:
            return prediction_type, f"its header says {architecture}", True
    if layout.default_prediction == "v_prediction":
        return (
            "v_prediction",
            "assumed, as most models of its kind predict v; a 512 px base needs --prediction-type epsilon",
            False,
        )
    return "epsilon", "not specified in the file; if it predicts v, use --prediction-type v_prediction", False
