"""Read parts of single-file checkpoints: every weight under one of its known keys, in fp32, with its fp8 scale.

A weight has several possible keys: the original program's, those of older files, and those of diffusers and transformers in
files that hold one part only. `Source` says how the stored tensor becomes the weight.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.teachers.single_file.inspect import Header, UnetKeys
from lcmdistill.teachers.single_file.mmdit_keys import mmdit_place, swapped
from lcmdistill.teachers.single_file.sd_keys import openclip_places, original_key, unet_places, vae_places
from lcmdistill.utils.errors import UsageError

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"the safetensors dtypes that weights are read from"

SCALES = (".scale_weight", ".weight_scale")
"a layer's scale in the two formats of scaled fp8; the weight is the stored tensor times its scale"

OTHER_SCALES = (".weight_scale_2", ".weight_scale_inv")
"the scales of quantized formats that are not read"

NOT_WEIGHTS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "v_pred", "ztsnr", "position_ids")
"the ends of keys that change nothing in fp32: what activations are scaled by, and markers"


class Source(NamedTuple):
    """Where a weight is stored.

    Attributes:
        key: The key in the file.
        part: Which third of the first axis it is, for query, key and value in one tensor; None for all of it.
        transposed: Whether the stored matrix is the weight's transpose.
        is_swapped: Whether the stored tensor's halves are in the other order.
    """

    key: str
    part: int | None = None
    transposed: bool = False
    is_swapped: bool = False


def without_weights(make: Callable[[], Any]) -> Any:
    """Return a module whose parameters are on the meta device, and whose buffers are not.

    Raises:
        ValueError: It has a buffer other than CLIP's positions, which are no weights and are in few files.
    """
    with torch.device("meta"):
        module = make()
    stored = module.state_dict()
    for name, buffer in list(module.named_buffers()):
        owner, _, last = name.rpartition(".")
        if last != "position_ids" and name in stored:
            continue  # a table that files hold among the weights
        if last != "position_ids":
            raise ValueError(f"{name} is a buffer of unknown content")
        positions = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
        module.get_submodule(owner).register_buffer(last, positions, persistent=False)
    return module


Sources = Mapping[str, Sequence[Source]]
"{name in the module's state_dict: its possible sources, the first stored one is read}"


class CheckpointFile:
    """The tensors of a safetensors file.

    Args:
        path: The file.
        header: Its header.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open nothing yet: tensors are read one by one."""
        self.path, self.tensors = path, header.tensors

    def fill(self, module: Any, sources: Sources, what: str) -> Any:
        """Assign a module's weights, which may be on the meta device, and return the module.

        Args:
            module: The module.
            sources: Where its weights are stored.
            what: The part's name in messages.

        Raises:
            UsageError: The file lacks a weight, or holds it in another shape or in an unknown number format.
        """
        stored = {
            name: next((each for each in options if each.key in self.tensors), None)
            for name, options in sources.items()
        }
        missing = [sources[name][0].key for name, source in stored.items() if source is None]
        if missing:
            raise UsageError(
                f"{self.path} lacks {missing[0]}, in total {len(missing)} of the {len(sources)} weights of its {what}; use a "
                "complete file"
            )
        self._require_scales([source for source in stored.values() if source is not None], what)
        state = {}
        with safe_open(self.path, "pt") as file:
            for name, value in module.state_dict().items():
                source = stored.get(name)
                state[name] = value if source is None else self._read(file, source, tuple(value.shape), what)
        module.load_state_dict(state, assign=True)
        return module

    def _require_scales(self, stored: Sequence[Source], what: str) -> None:
        """Raise UsageError if the file scales the fp8 matrices of a part, and the scale of one is missing."""
        stems = {key.removesuffix(".weight") for key, *_ in stored if self._is_fp8_matrix(key)}
        lost = sorted(stem for stem in stems if not any(f"{stem}{end}" in self.tensors for end in SCALES))
        marks = [key.removesuffix("scaled_fp8") for key in self.tensors if key.endswith("scaled_fp8")]
        is_marked = any(stem.startswith(mark) for mark in marks for stem in lost)
        if lost and (len(lost) < len(stems) or is_marked):
            raise UsageError(
                f"{self.path} lacks {lost[0]}{SCALES[0]}, in total {len(lost)} of the {len(stems)} scales of fp8 weights in "
                f"its {what}; use a complete file"
            )

    def _is_fp8_matrix(self, key: str) -> bool:
        dtype, shape = self.tensors[key]
        return dtype.startswith("F8") and len(shape) == 2 and key.endswith(".weight")

    def refuse_unread(self, prefix: str, sources: Sources, what: str) -> None:
        """Raise UsageError if the file has more layers below a prefix than were read: without them it is another model.

        Args:
            prefix: The prefix of the part's keys; "" for a file of that part only.
            sources: Where the part's weights are stored.
            what: The part's name in messages.
        """
        read = {source.key for options in sources.values() for source in options}
        unread = [
            key
            for key in self.tensors
            if key.startswith(prefix) and key not in read and not key.endswith((*SCALES, *NOT_WEIGHTS))
        ]
        if unread:
            raise UsageError(
                f"{self.path} holds {len(unread)} more weights in its {what} than this kind of model has, such as {unread[0]}; "
                "it is another kind of model, which is not supported"
            )

    def _read(self, file: Any, source: Source, shape: tuple[int, ...], what: str) -> Tensor:
        dtype = self.tensors[source.key][0]
        stem = source.key.removesuffix(".weight")
        others = [key for end in OTHER_SCALES if (key := f"{stem}{end}") in self.tensors]
        if dtype not in FLOATS or others:
            scaled = f", scaled by {others[0]}" if others else ""
            raise UsageError(
                f"{self.path}: {source.key} is quantized ({dtype}{scaled}), which is not supported; use a checkpoint in fp32, "
                "fp16 or bf16, or in fp8 with one scale per layer or none"
            )
        value = file.get_tensor(source.key).float()
        for suffix in SCALES if source.key.endswith(".weight") else ():
            if f"{stem}{suffix}" in self.tensors:
                scale = file.get_tensor(f"{stem}{suffix}").float()
                if scale.numel() != 1 and not len(scale) == scale.numel() == len(value):
                    raise UsageError(
                        f"{self.path}: {source.key} is block-scaled fp8, with scales of the shape {tuple(scale.shape)}, which "
                        "is not supported; use a checkpoint in fp32, fp16 or bf16, or in fp8 with one scale per layer"
                    )
                value = value * (scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (value.ndim - 1)))
        if source.part is not None:
            value = value.chunk(3)[source.part]
        value = value.T if source.transposed else value
        value = swapped(value) if source.is_swapped else value
        if _squeezed(value.shape) != _squeezed(shape):  # 1x1 convolutions may be stored as linear layers
            raise UsageError(
                f"{self.path} could not be loaded: {source.key} has the shape {tuple(value.shape)}, and the {what} of this "
                f"kind of model needs {shape}; it belongs to another model"
            )
        return value.reshape(shape).contiguous()


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [side for side in shape if side != 1]


def unet_sources(unet: Any, keys: UnetKeys) -> Sources:
    """Return where a UNet2DConditionModel's weights are stored.

    Args:
        unet: The network, whose config decides the original keys.
        keys: The layout and the prefix of the file's keys.
    """
    if keys.is_diffusers:
        return {name: [Source(f"{keys.prefix}{name}")] for name in unet.state_dict()}
    places = unet_places(unet.config)
    return {name: [Source(f"{keys.prefix}{original_key(name, places)}")] for name in unet.state_dict()}


def vae_sources(vae: Any) -> Sources:
    """Return where an AutoencoderKL's weights are stored."""
    places = vae_places(vae.config)
    return {name: [Source(f"first_stage_model.{original_key(name, places)}")] for name in vae.state_dict()}


def clip_sources(encoder: Any, prefix: str) -> Sources:
    """Return where a CLIP text encoder's weights are stored under transformers' names; prefix: what precedes them.

    Stable Diffusion's first files lack the `text_model.`, and so do models that were merged from them.
    """
    flat = {name: name.removeprefix("text_model.") for name in encoder.state_dict()}
    return {
        name: [Source(f"{prefix}{wrapper}{bare}") for wrapper in _wrappers(bare)]
        for name, bare in flat.items()
        if not bare.endswith("position_ids")
    }


def _wrappers(bare: str) -> tuple[str, ...]:
    return ("", "text_model.") if bare.startswith("text_projection") else ("text_model.", "")


def openclip_sources(encoder: Any, prefix: str) -> Sources:
    """Return where a CLIP text encoder's weights are stored under OpenCLIP's names; prefix: what precedes them."""
    places = openclip_places(encoder.config.num_hidden_layers)
    sources: dict[str, list[Source]] = {}
    for name in encoder.state_dict():
        bare = name.removeprefix("text_model.")
        parts = bare.split(".")
        if bare.endswith("position_ids"):
            continue
        if parts[-2] in ("q_proj", "k_proj", "v_proj"):
            whole = original_key(".".join([*parts[:-2], f"in_proj_{parts[-1]}"]), places)
            sources[name] = [Source(f"{prefix}{whole}", part="qkv".index(parts[-2][0]))]
        elif bare == "text_projection.weight":  # x @ P there, a Linear here
            sources[name] = [
                Source(f"{prefix}text_projection", transposed=True),
                Source(f"{prefix}text_projection.weight"),
            ]
        else:
            sources[name] = [Source(f"{prefix}{original_key(bare, places)}")]
    return sources


def mmdit_sources(transformer: Any, keys: UnetKeys) -> Sources:
    """Return where an SD3Transformer2DModel's weights are stored under the original names."""
    places = {name: mmdit_place(name, transformer.config.num_layers) for name in transformer.state_dict()}
    return {
        name: [Source(f"{keys.prefix}{place.key}", place.part, is_swapped=place.is_swapped)]
        for name, place in places.items()
    }


def t5_sources(encoder: Any, prefix: str) -> Sources:
    """Return where a T5 encoder's weights are stored; its embeddings have two names, of which files have one."""
    embeddings = ("shared.weight", "encoder.embed_tokens.weight")
    return {
        name: [Source(f"{prefix}{each}") for each in (embeddings if name in embeddings else (name,))]
        for name in encoder.state_dict()
    }


TEXT_SOURCES = {
    "clip": clip_sources,
    "clip-projection": clip_sources,
    "t5": t5_sources,
    "openclip": openclip_sources,
    "openclip-penultimate": openclip_sources,
}
"the key styles of SingleFileLayout.text_encoders: (encoder, key prefix) -> its sources"
