"""Read LoRA files of the common layouts, and load them into a pipeline."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.lora.adapters import LoraLayer, padded, put_lora
from lcmdistill.teachers.lora.checks import SUFFIXES, check_fit, check_type, known_prefixes, twice_error
from lcmdistill.teachers.lora.kinds import (
    MAGNITUDE,
    adapter_settings,
    flat_path,
    is_magnitude,
    kinds_of,
)
from lcmdistill.teachers.lora.lycoris import Target, low_rank, merge_lycoris, split_layers
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

Lora = Mapping[str, LoraLayer]


def load_lora(pipeline: Any, lora: str, name: str, scale: float = 1.0, *, option: str = "--lora") -> bool:
    """Load a LoRA into a pipeline's network and text encoders.

    Args:
        pipeline: The pipeline to change.
        lora: A kohya, LyCORIS or diffusers file, or a diffusers or peft folder.
        name: The adapter's name.
        scale: How strongly a file acts that is merged into the weights. Adapters are scaled by the caller.
        option: The option that named it, for messages.

    Returns:
        Whether the LoRA became an adapter; if not, it was merged.

    Raises:
        UsageError: The file does not exist, holds no LoRA, or has layers that the model lacks.
    """
    label, family = f"{option} {lora}", family_of(pipeline)
    file, weights, peft_lora = _read(pipeline, lora, label)
    if kinds_of(weights):
        weights = kohya_form(family, weights, _header(file), label)
        merge_lycoris(pipeline, known_prefixes(family), weights, label, scale)
        return False
    check_fit(pipeline, family, weights, label)
    if peft_lora is not None and "kohya" not in family.lora_formats:  # diffusers reads no kohya keys there
        put_lora(network_of(pipeline), peft_lora, name)
        return True
    is_kohya = any(key.endswith(".lora_down.weight") for key in weights)
    if "kohya" in family.lora_formats and any(key.endswith(".alpha") for key in weights) and not is_kohya:
        is_kohya = True  # diffusers reads no alphas there
    if is_kohya and "kohya" not in family.lora_formats:
        raise UsageError(
            f"{label} has kohya's keys, which a {type(network_of(pipeline)).__name__} does not take; use a file with "
            "diffusers' keys or a peft folder"
        )
    source: Any = str(file.parent)
    options = {"weight_name": file.name}
    try:
        if is_kohya:  # placed here: diffusers' converter loses layers without a word that it knows by another name
            weights = kohya_form(family, weights, _header(file), label)
            source, options = _diffusers_form(split_layers(pipeline, known_prefixes(family), weights, label)), {}
        with warnings.catch_warnings(), _without_load_reports():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs at once are intended
            pipeline.load_lora_weights(source, adapter_name=name, **options)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UsageError(f"{label} cannot be loaded into this model: {reason}") from error
    return True


def read_kohya_form(pipeline: Any, lora: str, label: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of any layout under kohya's keys, checked against a pipeline.

    Args:
        pipeline: The pipeline that it is for.
        lora: As for `load_lora`.
        label: What messages call it, such as "--lora FILE".

    Raises:
        UsageError: As for `load_lora`.
    """
    file, weights, _ = _read(pipeline, lora, label)
    if not kinds_of(weights):
        check_fit(pipeline, family_of(pipeline), weights, label)
    return kohya_form(family_of(pipeline), weights, _header(file), label)


def _read(pipeline: Any, lora: str, label: str) -> tuple[Path, dict[str, Tensor], dict[str, LoraLayer] | None]:
    """Return a LoRA's file, its tensors, those of a peft folder under kohya's keys, and a peft folder's layers."""
    file, family, network = lora_weights_file(lora, label), family_of(pipeline), network_of(pipeline)
    if not family.lora_formats:
        raise UsageError(f"{label}: a {type(pipeline).__name__} takes no LoRA; remove the option")
    weights = _tensors_of(file, label)
    adapter = file.with_name("adapter_config.json")
    if adapter.is_file():
        magnitudes = {key: value for key, value in weights.items() if is_magnitude(key)}
        plain = {key: value for key, value in weights.items() if key not in magnitudes}
        peft_lora = from_peft(plain, _config_of(adapter, label), label)
        weights = kohya_tensors(peft_lora, torch.float32)
        for key, value in magnitudes.items():
            path = key.removeprefix("base_model.model.").partition(MAGNITUDE)[0].replace(".", "_")
            weights[f"lora_unet_{path}.dora_scale"] = value.flatten()
        return file, weights, peft_lora
    if family.uses_peft_only:
        raise UsageError(f"{label} is not a peft folder, the only kind that a {type(network).__name__} takes")
    return file, weights, None


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


def lora_weights_file(lora: str, label: str) -> Path:
    """Return the one .safetensors file of a LoRA's file or folder.

    Raises:
        UsageError: There is none, or several.
    """
    path = Path(lora).expanduser()
    if not path.exists():
        raise UsageError(f"{label} does not exist; specify a .safetensors file, or a diffusers or peft folder")
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        if not files and any((path / "lora").glob("[!.]*.safetensors")):
            raise UsageError(f"{label} is a run; pass the LoRA in it: {path / 'lora'}")
        raise UsageError(
            f"{label} has {len(files)} .safetensors files and must have one; pickles are not read"
            if path.is_dir()
            else f"{label} is not a .safetensors file; pickles are not read"
        )
    return files[0]


def _diffusers_form(layers: Sequence[tuple[str, Target, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return plain LoRA layers under diffusers' keys, with each alpha merged into the weights, zero-padded to one rank.

    diffusers supports neither alphas nor ranks per layer next to these keys.
    """
    updates = {f"{target.part}.{target.path}": low_rank(target.module, layer) for _, target, layer in layers}
    most = max(len(update.down) for update in updates.values())
    tensors = {}
    for path, update in padded(updates, most).items():
        tensors |= {f"{path}.lora_A.weight": update.down, f"{path}.lora_B.weight": update.up}
    return tensors


def from_peft(weights: Mapping[str, Tensor], config: Mapping[str, Any], label: str) -> dict[str, LoraLayer]:
    """Return a peft adapter as a Lora, with ranks, alphas and rsLoRA's scale as peft reads them.

    Args:
        weights: The adapter's tensors.
        config: Its adapter_config.json.
        label: What messages call it, such as "--lora FILE".

    Raises:
        UsageError: The adapter holds more than plain low-rank updates, which would be lost.
    """
    plain = {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in weights.items()}
    paths = [key.removesuffix(".lora_A") for key in plain if key.endswith(".lora_A")]
    others = [key for key in plain if key.removesuffix(".lora_A").removesuffix(".lora_B") not in paths]
    if config.get("peft_type", "LORA") != "LORA" or others:
        what = f"such as {others[0]}" if others else f"{config['peft_type']}, which is not LoRA"
        raise UsageError(f"{label} holds more than plain LoRA layers, {what}; export it with them merged")
    layers = {}
    for path in paths:
        down = plain[f"{path}.lora_A"]
        layers[path] = LoraLayer(down, plain[f"{path}.lora_B"], _peft_alpha(config, path, len(down), label))
    return layers


def _peft_alpha(config: Mapping[str, Any], path: str, rank: int, label: str) -> float:
    """Return a layer's alpha, by which its update is scaled as alpha / r, in a peft config with patterns and rsLoRA.

    Raises:
        UsageError: The config has no alpha for the layer that is a number other than 0.
    """
    from peft.utils.other import get_pattern_key

    try:
        patterns = config.get("alpha_pattern") or {}
        alpha = float(patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"]))
    except (AttributeError, KeyError, TypeError, ValueError, re.error):
        alpha = math.nan
    if not math.isfinite(alpha) or alpha == 0:
        raise UsageError(f"{label} has adapter settings without a usable alpha for {path}; export the LoRA again")
    # rsLoRA scales by alpha / sqrt(r) (Kalajdzievski 2023), every other layout by alpha / r.
    return alpha * rank ** (0.5 * bool(config.get("use_rslora")))


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def kohya_form(
    family: TeacherFamily, weights: Mapping[str, Tensor], header: Mapping[str, str], label: str
) -> dict[str, Tensor]:
    """Return diffusers' tensors under kohya's keys, with alphas as the header states them; kohya's own stay as they are.

    Args:
        family: The family of the base.
        weights: The file's tensors.
        header: The file's header, which may hold the adapter's settings.
        label: What messages call the file, such as "--lora FILE".

    Raises:
        UsageError: The settings are damaged, or two keys name the same tensor.
    """
    kohya = {part: prefix for prefix, part in family.lora_prefixes.items() if prefix.endswith("_")}
    dotted = {prefix: part for prefix, part in family.lora_prefixes.items() if prefix.endswith(".")}
    settings, tensors = adapter_settings(header, label), dict[str, Tensor]()
    own_settings = {
        prefix: {name.removeprefix(prefix): each for name, each in settings.items() if name.startswith(prefix)}
        for prefix in dotted
    }
    for key, value in weights.items():
        prefix = next((prefix for prefix in dotted if key.startswith(prefix)), None)
        suffix, end = next(((s, end) for s, end in _KOHYA_ENDS if key.endswith(s)), ("", ""))
        if prefix is None or not suffix:
            if key in tensors:
                raise twice_error(label, key)
            tensors[key] = value
            continue
        path = key.removeprefix(prefix).removesuffix(suffix)
        stem = f"{kohya[dotted[prefix]]}{flat_path(path)}"
        if f"{stem}.{end}" in tensors:
            raise twice_error(label, key)
        tensors[f"{stem}.{end}"] = value.flatten() if end == "dora_scale" else value
        if end == "lora_down.weight" and "lora_alpha" in own_settings[prefix]:
            tensors[f"{stem}.alpha"] = torch.tensor(_peft_alpha(own_settings[prefix], path, len(value), label))
    return tensors


def _config_of(path: Path, label: str) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{label}: {path.name} is not a peft config with a lora_alpha; export the LoRA again"
        ) from error
    return config


def _tensors_of(path: Path, label: str) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{label} is not a safetensors file: {error}") from error
    # What 8-bit floats stand for; torch computes nothing with them.
    tensors = {k: v.half() if v.is_floating_point() and v.itemsize == 1 else v for k, v in tensors.items()}
    if empty := next((key for key, value in tensors.items() if not value.numel()), None):
        raise UsageError(f"{label} is damaged: {empty} is empty")
    if broken := next((key for key, value in tensors.items() if not value.isfinite().all()), None):
        raise UsageError(
            f"{label} holds weights that are not finite, such as {broken}, and would give black images; use an "
            "earlier checkpoint"
        )
    for key, value in tensors.items():
        check_type(key, value, label)
    return tensors


_KOHYA_ENDS = (
    *((suffix, f"lora_{'down' if axis else 'up'}.weight") for suffix, axis in SUFFIXES),
    *((f"{MAGNITUDE}.weight", "dora_scale"), (MAGNITUDE, "dora_scale"), (".alpha", "alpha")),
)
"the ends of keys in diffusers' files, and what kohya calls them"


def kohya_tensors(lora: Lora, dtype: torch.dtype, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """Return `lora_unet_<path with _>.lora_down.weight | lora_up.weight | alpha` for every layer."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.items():
        name = f"{prefix}{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.up.to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=dtype)
    return tensors
