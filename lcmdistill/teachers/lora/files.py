"""Read LoRA files of the common layouts, and load them into a pipeline."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.lora.adapters import LoraLayer, put_lora
from lcmdistill.teachers.lora.kinds import flat_path, kinds_of, other_kinds_of
from lcmdistill.teachers.lora.lycoris import merge_lycoris
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import FAMILIES, family_of
from lcmdistill.utils.errors import UsageError

Lora = Mapping[str, LoraLayer]


def load_lora(pipeline: Any, lora: str, name: str, scale: float = 1.0) -> bool:
    """Load a LoRA into a pipeline's network and text encoders.

    Args:
        pipeline: The pipeline to change.
        lora: A kohya, LyCORIS or diffusers file, or a diffusers or peft folder.
        name: The adapter's name.
        scale: How strongly a file acts that is merged into the weights. Adapters are scaled by the caller.

    Returns:
        Whether the LoRA became an adapter; if not, it was merged.

    Raises:
        UsageError: The file does not exist, holds no LoRA, or has layers that the model lacks.
    """
    file, family, network = lora_weights_file(lora), family_of(pipeline), network_of(pipeline)
    if not family.lora_formats:
        raise UsageError(f"--lora {lora}: a {type(pipeline).__name__} takes no LoRA; remove the option")
    weights = _tensors_of(file)
    adapter = file.with_name("adapter_config.json")
    peft_lora = from_peft(weights, _config_of(adapter, lora), lora) if adapter.is_file() else None
    weights = weights if peft_lora is None else kohya_tensors(peft_lora, torch.float32)
    if family.uses_peft_only and peft_lora is None:
        raise UsageError(f"--lora {lora} is not a peft folder, the only kind that a {type(network).__name__} takes")
    if kinds_of(weights):
        merge_lycoris(pipeline, family.lora_prefixes, weights, lora, scale)
        return False
    _check_fit(pipeline, family, weights, lora)
    if peft_lora is not None and "kohya" not in family.lora_formats:  # diffusers reads no kohya keys there
        put_lora(network, peft_lora, name)
        return True
    is_kohya = any(key.endswith(".lora_down.weight") for key in weights)
    if is_kohya and "kohya" not in family.lora_formats:
        raise UsageError(
            f"--lora {lora} has kohya's keys, which a {type(network).__name__} does not take; use a file with diffusers' keys "
            "or a peft folder"
        )
    source: Any = _even(weights) if is_kohya else str(file.parent)
    options = {} if is_kohya else {"weight_name": file.name}
    try:
        with warnings.catch_warnings(), _without_load_reports():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs at once are intended
            pipeline.load_lora_weights(source, adapter_name=name, **options)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"--lora {lora} cannot be loaded into this model: {str(error).splitlines()[0]}") from error
    return True


@contextmanager
def _without_load_reports() -> Iterator[None]:
    """Silence transformers, which lists every weight of an adapted text encoder as missing, although all are in place."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def lora_weights_file(lora: str) -> Path:
    """Return the one .safetensors file of a LoRA's file or folder. Raises UsageError if there is none."""
    path = Path(lora).expanduser()
    if not path.exists():
        raise UsageError(f"--lora {lora} does not exist; specify a .safetensors file, or a diffusers or peft folder")
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise UsageError(
            f"--lora {lora} has {len(files)} .safetensors files and must have one; pickles are not read"
            if path.is_dir()
            else f"--lora {lora} is not a .safetensors file; pickles are not read"
        )
    return files[0]


def _even(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return kohya's tensors with each layer's alpha merged into its weights, zero-padded to one rank.

    diffusers supports neither alphas nor ranks per layer in this layout, and rejects them next to peft's keys.
    """
    stems = [key.removesuffix(".lora_down.weight") for key in weights if key.endswith(".lora_down.weight")]
    most = max(len(weights[f"{stem}.lora_down.weight"]) for stem in stems)
    tensors = {key: value for key, value in weights.items() if key.removesuffix(".alpha") not in stems}
    for stem in stems:
        down, up = (weights[f"{stem}.lora_{part}.weight"].float() for part in ("down", "up"))
        rank = len(down)
        up = up * (float(weights.get(f"{stem}.alpha", rank)) / rank)
        tensors[f"{stem}.lora_down.weight"] = torch.cat([down, down.new_zeros(most - rank, *down.shape[1:])])
        tensors[f"{stem}.lora_up.weight"] = torch.cat([up, up.new_zeros(len(up), most - rank, *up.shape[2:])], 1)
    return tensors


def from_peft(weights: Mapping[str, Tensor], config: Mapping[str, Any], lora: str) -> dict[str, LoraLayer]:
    """Return a peft adapter as a Lora, with ranks, alphas and rsLoRA's scale as peft reads them.

    Args:
        weights: The adapter's tensors.
        config: Its adapter_config.json.
        lora: Its name in messages.

    Raises:
        UsageError: The adapter holds more than plain low-rank updates, which would be lost.
    """
    from peft.utils.other import get_pattern_key

    plain = {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in weights.items()}
    paths = [key.removesuffix(".lora_A") for key in plain if key.endswith(".lora_A")]
    others = [key for key in plain if key.removesuffix(".lora_A").removesuffix(".lora_B") not in paths]
    if config.get("peft_type", "LORA") != "LORA" or others:
        what = f"such as {others[0]}" if others else f"{config['peft_type']}, which is not LoRA"
        raise UsageError(f"--lora {lora} holds more than plain LoRA layers, {what}; export it with them merged")
    patterns = config.get("alpha_pattern") or {}
    layers = {}
    for path in paths:
        alpha = float(patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"]))
        down = plain[f"{path}.lora_A"]
        # rsLoRA scales by alpha / sqrt(r) (Kalajdzievski 2023), every other layout by alpha / r.
        layers[path] = LoraLayer(
            down, plain[f"{path}.lora_B"], alpha * len(down) ** (0.5 * bool(config.get("use_rslora")))
        )
    return layers


def _config_of(path: Path, lora: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--lora {lora}: {path.name} is not a peft config with a lora_alpha; export the LoRA again"
        ) from error
    return config


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"--lora {path} is not a safetensors file: {error}") from error
    if broken := next((key for key, value in tensors.items() if not value.isfinite().all()), None):
        raise UsageError(
            f"--lora {path} holds weights that are not finite, such as {broken}, and would give black images; use an "
            "earlier checkpoint"
        )
    return tensors


def _check_fit(pipeline: Any, family: TeacherFamily, weights: Mapping[str, Tensor], lora: str) -> None:
    """Raise UsageError unless the model has every layer of a LoRA, with the same input and output widths."""
    # The other families' prefixes are known too: a LoRA that has them belongs to another base.
    prefixes = {prefix: part for each in FAMILIES.values() for prefix, part in each.lora_prefixes.items()}
    prefixes |= family.lora_prefixes
    widths = {part: _widths(getattr(pipeline, part, None)) for part in set(prefixes.values())}
    absent, mismatched, unknown, halves = [], [], [], dict[tuple[str, str], set[int]]()
    for key, value in weights.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        suffix, axis = next(((s, axis) for s, axis in _SUFFIXES if key.endswith(s)), ("", 0))
        if not prefix or not suffix:
            unknown += [] if prefix and key.endswith(".alpha") else [key]
            continue
        part, path = prefixes[prefix], flat_path(key.removeprefix(prefix).removesuffix(suffix))
        halves.setdefault((part, path), set()).add(axis)
        # diffusers' loader converts names of the original layout.
        if path.startswith(("input_blocks", "middle_block", "output_blocks")):
            continue
        if path not in widths[part]:
            absent.append(key)
        elif value.shape[axis] != widths[part][path][axis]:
            mismatched.append(key)
    is_comfy = any("diffusion_model." in key for key in unknown)
    kind = " with ComfyUI's model keys" if is_comfy else "".join(f" of {kind}" for kind in other_kinds_of(unknown)[:1])
    if not halves:
        found = f"; it has tensors{kind} such as {unknown[0]}" if unknown else ""
        raise UsageError(
            f"--lora {lora} holds no LoRA in a known layout (kohya, diffusers or peft keys){found}; merge it into its base, or "
            "export it as a plain LoRA"
        )
    if unknown:
        raise UsageError(
            f"--lora {lora} holds {len(unknown)} tensors{kind} beyond plain LoRA layers, such as {unknown[0]}; without them "
            "it would generate other images: merge it into its base, or export it as a plain LoRA"
        )
    if single := [path for (_, path), axes in halves.items() if len(axes) == 1]:
        raise UsageError(
            f"--lora {lora} is damaged: {len(single)} of its layers have one matrix instead of two, such as {single[0]}"
        )
    if absent or mismatched:
        first = (absent or mismatched)[0]
        raise UsageError(
            f"--lora {lora} does not fit this model: {len(absent)} of its layers are absent and {len(mismatched)} have another "
            f"width, such as {first}; it was made for another base"
        )


def _widths(part: Any) -> dict[str, Sequence[int]]:
    """Return {a layer's path with _: its weight's shape} of a network or text encoder, adapted or not; {} for None."""
    named = [] if part is None else part.named_modules()
    weights = [(path, getattr(module, "weight", None)) for path, module in named]  # a norm may have none
    return {flat_path(path.removesuffix(".base_layer")): w.shape for path, w in weights if w is not None}


_DOWN_UP = (("down", 1), ("up", 0))

_SUFFIXES = (
    (".lora_down.weight", 1),
    (".lora_up.weight", 0),
    (".lora_A.weight", 1),
    (".lora_B.weight", 0),
    # diffusers before peft, for U-Nets and for text encoders; ".down.weight" ends processor.to_q_lora
    *((f"{start}.{part}.weight", axis) for start in (".lora", ".lora_linear_layer", "") for part, axis in _DOWN_UP),
)


def kohya_tensors(lora: Lora, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `lora_unet_<path with _>.lora_down.weight | lora_up.weight | alpha` for every layer."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.up.to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=dtype)
    return tensors
