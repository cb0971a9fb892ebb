"""Read LoRA files of the common layouts and load them into a pipeline."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lcmdistill.students.lora import LoraLayer, put_lora
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.utils.errors import UsageError

Lora = Mapping[str, LoraLayer]

SCHEDULER_KEY = "lcmdistill.scheduler"
"where a file's header names the class of diffusers that draws with it"

ORIGINAL_STEPS_KEY = "lcmdistill.original_inference_steps"
"the header entry with the scheduler's `original_inference_steps`: T / k of the training"

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"the file that diffusers looks for in a folder; offline, older versions have to be told"


def rank_of(lora: Lora) -> int:
    """r, the same in every layer that lcmdistill trains."""
    return next(iter(lora.values())).down.shape[0]


def alpha_of(lora: Lora) -> float:
    """alpha, the same in every layer that lcmdistill trains."""
    return next(iter(lora.values())).alpha


def load_lora(pipeline: Any, lora: str, name: str) -> None:
    """Put a LoRA of any of the three kinds on a pipeline, as adapter `name`, and its text encoders' layers on those.

    Raises UsageError if the file is not there, holds no LoRA, or has layers that the model has not.
    """
    file = _file_of(lora)
    weights = _tensors_of(file)
    adapter = file.with_name("adapter_config.json")
    of_peft = from_peft(weights, _config_of(adapter, lora), lora) if adapter.is_file() else None
    weights = weights if of_peft is None else kohya_tensors(of_peft, torch.float32)
    network = network_of(pipeline)
    _check_fit(pipeline, network, weights, lora)
    if not hasattr(pipeline, "load_lora_weights"):
        if of_peft is None:
            raise UsageError(f"--lora {lora} is no peft folder, the only kind that a {type(network).__name__} takes")
        put_lora(network, of_peft, name)
        return
    is_kohya = any(key.endswith(".lora_down.weight") for key in weights)
    source: Any = _even(weights) if is_kohya else str(file.parent)
    options = {} if is_kohya else {"weight_name": file.name}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs at once are meant
            pipeline.load_lora_weights(source, adapter_name=name, **options)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"--lora {lora} cannot be loaded into this model: {str(error).splitlines()[0]}") from error


def scheduler_of(lora: str) -> str | None:
    """The scheduler that a LoRA's header names; None of one that lcmdistill did not train."""
    try:
        with safe_open(_file_of(lora), framework="pt") as file:
            return (file.metadata() or {}).get(SCHEDULER_KEY)
    except SafetensorError as error:
        raise UsageError(f"--lora {lora} is no safetensors file: {error}") from error


def original_steps_of(lora: str) -> int | None:
    """Return the `original_inference_steps` that a LoRA's header records, or None."""
    with safe_open(_file_of(lora), framework="pt") as file:
        value = (file.metadata() or {}).get(ORIGINAL_STEPS_KEY, "")
    return int(value) if value.isdecimal() else None


def _file_of(lora: str) -> Path:
    path = Path(lora).expanduser()
    if not path.exists():
        raise UsageError(f"--lora {lora} does not exist; give a .safetensors file, or a diffusers or peft folder")
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise UsageError(
            f"--lora {lora}: one .safetensors file is wanted, {len(files)} were found; a pickle is not read"
        )
    return files[0]


def _even(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's tensors with each layer's alpha in its weights, and zeros up to one rank.

    diffusers knows neither alphas nor ranks that differ from layer to layer, and takes none beside peft's keys.
    """
    stems = [key.removesuffix(".lora_down.weight") for key in weights if key.endswith(".lora_down.weight")]
    most = max(len(weights[f"{stem}.lora_down.weight"]) for stem in stems)
    made = {key: value for key, value in weights.items() if key.removesuffix(".alpha") not in stems}
    for stem in stems:
        down, up = (weights[f"{stem}.lora_{part}.weight"].float() for part in ("down", "up"))
        rank = len(down)
        up = up * (float(weights.get(f"{stem}.alpha", rank)) / rank)
        made[f"{stem}.lora_down.weight"] = torch.cat([down, down.new_zeros(most - rank, *down.shape[1:])])
        made[f"{stem}.lora_up.weight"] = torch.cat([up, up.new_zeros(len(up), most - rank, *up.shape[2:])], 1)
    return made


def from_peft(weights: Mapping[str, Tensor], config: Mapping[str, Any], lora: str) -> dict[str, LoraLayer]:
    """A peft adapter's tensors and config as a Lora; ranks, alphas and rsLoRA's other scale as peft reads them.

    Raises UsageError if it holds more than plain low-rank updates, which would be lost.
    """
    from peft.utils.other import get_pattern_key

    plain = {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in weights.items()}
    paths = [key.removesuffix(".lora_A") for key in plain if key.endswith(".lora_A")]
    others = [key for key in plain if key.removesuffix(".lora_A").removesuffix(".lora_B") not in paths]
    if config.get("peft_type", "LORA") != "LORA" or others:
        what = f"such as {others[0]}" if others else f"{config['peft_type']} and no LoRA"
        raise UsageError(f"--lora {lora} holds more than plain LoRA layers, {what}; export it with them merged")
    patterns = config.get("alpha_pattern") or {}
    layers = {}
    for path in paths:
        alpha = float(patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"]))
        down = plain[f"{path}.lora_A"]
        # peft scales by alpha / sqrt(r) there (Kalajdzievski 2023), everybody else by alpha / r.
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
            f"--lora {lora}: {path.name} is no peft config with a lora_alpha; export the LoRA again"
        ) from error
    return config


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"--lora {path} is no safetensors file: {error}") from error
    if broken := next((key for key, value in tensors.items() if not value.isfinite().all()), None):
        raise UsageError(
            f"--lora {path} holds weights that are not finite, such as {broken}, and would draw black; take an earlier one"
        )
    return tensors


def _check_fit(pipeline: Any, network: Any, weights: Mapping[str, Tensor], lora: str) -> None:
    """Every layer that a LoRA names must be in the model, with the same width of input and output."""
    widths = {
        place: _widths(network if place == "unet" else getattr(pipeline, place, None))
        for place in {place for _, place in _PREFIXES}
    }
    absent, other, known, halves = [], [], False, dict[tuple[str, str], set[int]]()
    for key, value in weights.items():
        prefix, place = next(((p, place) for p, place in _PREFIXES if key.startswith(p)), ("", ""))
        suffix, axis = next(((s, axis) for s, axis in _SUFFIXES if key.endswith(s)), ("", 0))
        if not prefix or not suffix:
            continue
        known, path = True, _flat(key.removeprefix(prefix).removesuffix(suffix))
        halves.setdefault((place, path), set()).add(axis)
        # The original layout's names (input_blocks and so on) are the loader's own business.
        if path.startswith(("input_blocks", "middle_block", "output_blocks")):
            continue
        if path not in widths[place]:
            absent.append(key)
        elif value.shape[axis] != widths[place][path][axis]:
            other.append(key)
    if not known:
        raise UsageError(f"--lora {lora} holds no LoRA that is known here (kohya, diffusers or peft keys)")
    if lone := [path for (_, path), axes in halves.items() if len(axes) == 1]:
        raise UsageError(
            f"--lora {lora} is damaged: of {len(lone)} of its layers one matrix of two is there, such as {lone[0]}"
        )
    if absent or other:
        first = (absent or other)[0]
        raise UsageError(
            f"--lora {lora} does not fit this model: {len(absent)} of its layers are not there and {len(other)} have another "
            f"width, such as {first}; it was made for another base"
        )


def _widths(part: Any) -> dict[str, Sequence[int]]:
    """{a layer's path with _: its weight's shape} of a network or text encoder, adapters on it or not; {} of None."""
    named = [] if part is None else part.named_modules()
    weights = [(path, getattr(module, "weight", None)) for path, module in named]  # a norm may have none
    return {_flat(path.removesuffix(".base_layer")): w.shape for path, w in weights if w is not None}


def _flat(path: str) -> str:
    """A path as kohya writes it, without the `text_model` that some versions of transformers leave out, and without what
    diffusers of 2023 wrote into the paths of attentions."""
    return re.sub(r"_processor_(to_\w+)_lora$", _of_2023, path.replace(".", "_")).removeprefix("text_model_")


def _of_2023(found: re.Match[str]) -> str:
    return f"_{found[1]}_0" if found[1] == "to_out" else f"_{found[1]}"


_OLD = (("down", 1), ("up", 0))

_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("unet.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
)

_SUFFIXES = (
    (".lora_down.weight", 1),
    (".lora_up.weight", 0),
    (".lora_A.weight", 1),
    (".lora_B.weight", 0),
    # diffusers before peft, of U-Nets and of text encoders; ".down.weight" is of processor.to_q_lora
    *((f"{start}.{part}.weight", axis) for start in (".lora", ".lora_linear_layer", "") for part, axis in _OLD),
)


def kohya_tensors(lora: Lora, dtype: torch.dtype) -> dict[str, Tensor]:
    """`lora_unet_<path with _>.lora_down.weight | lora_up.weight | alpha`; every key begins with lora_unet_."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.up.to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=dtype)
    return tensors
