"""LoRA files beyond plain LoRA, merged into the weights: DoRA, LoHa, LoKr, Tucker convolutions, norms and full differences.

The layouts and the arithmetic are those of LyCORIS 4.1 (Yeh et al. 2023, arXiv:2309.14859). An update of several factors is
scaled by alpha / r; `tests/slow/clients` compares every kind with lycoris-lora.

Shapes: O outputs and I inputs of a layer, r rank, k its kernel.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcmdistill.teachers.lora.adapters import LoraLayer
from lcmdistill.teachers.lora.checks import named_layers, twice_error
from lcmdistill.teachers.lora.kinds import KINDS, flat_path, split_key
from lcmdistill.utils.errors import UsageError

PREFIXES = {"lycoris_": "unet"}
"the prefixes of LyCORIS' own wrapper, besides those of kohya"

Layer = dict[str, Tensor]
"the tensors of one layer, by the end of their key"


class Target(NamedTuple):
    """The layer of a model that a file changes: its component in the pipeline, its path there, and the module."""

    part: str
    path: str
    module: Any


def merge_lycoris(
    pipeline: Any, prefixes: Mapping[str, str], weights: Mapping[str, Tensor], label: str, scale: float
) -> None:
    """Merge a file with kohya's keys into the weights of a pipeline.

    Args:
        pipeline: The pipeline to change.
        prefixes: {prefix of a key: the component it belongs to}.
        weights: The file's tensors.
        label: What messages call it, such as "--lora FILE".
        scale: How strongly it acts; 1 as trained.

    Raises:
        UsageError: The file holds tensors of an unknown kind, or layers that the model lacks or has in other shapes.
    """
    layers = split_layers(pipeline, prefixes, weights, label)
    merged = [(target.module, _merged(target.module, layer, stem, label, scale)) for stem, target, layer in layers]
    with torch.no_grad():
        for module, parameters in merged:
            for name, value in parameters.items():
                getattr(module, name).copy_(value)


def split_layers(
    pipeline: Any, prefixes: Mapping[str, str], weights: Mapping[str, Tensor], label: str
) -> list[tuple[str, Target, Layer]]:
    """Return the layers of a file with kohya's keys: their names, what they change, and their tensors in fp32.

    Args:
        pipeline: The pipeline that the file is for.
        prefixes: {prefix of a key: the component it belongs to}.
        weights: The file's tensors.
        label: What messages call it, such as "--lora FILE".

    Raises:
        UsageError: The file holds tensors of an unknown kind, or layers that the model lacks.
    """
    layers: dict[str, Layer] = {}
    unknown = [key for key in weights if not split_key(key)[1]]
    if unknown:
        raise UsageError(
            f"{label} holds {len(unknown)} tensors of a kind that is not supported, such as {unknown[0]}; supported "
            f"besides LoRA are {', '.join(kind for kind in KINDS if kind != 'lora')}: merge it into its base instead"
        )
    for key, value in weights.items():
        stem, end = split_key(key)
        layers.setdefault(stem, {})[end] = value.float()
    for stem, layer in layers.items():
        _check_layer(stem, layer, label)
    known = {prefix: _targets(pipeline, part) for prefix, part in (*prefixes.items(), *PREFIXES.items())}
    targets = {stem: _target_of(stem, known) for stem in layers}
    absent = [stem for stem, target in targets.items() if target is None]
    if absent:
        raise UsageError(
            f"{label} does not fit this model: {len(absent)} of its layers are absent, such as {absent[0]}; it was made "
            "for another base"
        )
    found = [(stem, target, layers[stem]) for stem, target in targets.items() if target is not None]
    places = [target[:2] for _, target, _ in found]
    if twice := next((stem for stem, target, _ in found if places.count(target[:2]) > 1), None):
        raise twice_error(label, twice)
    return found


def low_rank(module: Any, layer: Mapping[str, Tensor], scale: float = 1.0) -> LoraLayer:
    """Return a plain LoRA layer of a file in the shape of a module, with alpha = r.

    Args:
        module: The layer that it changes.
        layer: Its tensors, by the end of their key.
        scale: How strongly it acts; 1 as trained.
    """
    is_linear = hasattr(module, "in_features")  # a quantized weight has another shape than its layer
    shape = (module.out_features, module.in_features) if is_linear else module.weight.shape
    down, up = layer["lora_down.weight"], layer["lora_up.weight"]
    rank = len(down)
    factor = scale * float(layer.get("alpha", torch.tensor(float(rank)))) / rank
    return LoraLayer(down.reshape(rank, *shape[1:]), factor * up.reshape(shape[0], rank, *[1] * (len(shape) - 2)), rank)


_CHANGES = {"norms": "w_norm", "full differences": "diff", "LoHa": "hada", "LoKr": "lokr", "LoRA": "lora"}
"kinds that change a layer's weight, and what the ends of their keys start with"


def _check_layer(stem: str, layer: Layer, label: str) -> None:
    """Raise UsageError for a layer with two changes of its weight, of which one would be lost, or with none."""
    changes = [kind for kind, start in _CHANGES.items() if any(e.startswith(start) and e != "diff_b" for e in layer)]
    if len(changes) > 1:
        raise UsageError(
            f"{label} holds two changes of one weight, {' and '.join(changes)} of {stem}; export it as one of them"
        )
    if not changes and not layer.keys() & {"b_norm", "diff_b"}:
        raise UsageError(
            f"{label} is damaged: {stem} has nothing but {' and '.join(sorted(layer))}; download or export it again"
        )


def _targets(pipeline: Any, part: str) -> dict[str, Target]:
    """Return {a layer's name: the layer} of a component; {} if it is absent."""
    layers = named_layers(getattr(pipeline, part, None))
    return {name: Target(part, path, module) for name, (path, module) in layers.items()}


def _target_of(stem: str, known: Mapping[str, Mapping[str, Target]]) -> Target | None:
    for prefix, targets in known.items():
        if stem.startswith(prefix):
            target = targets.get(flat_path(stem.removeprefix(prefix)))
            if target is not None:
                return target
    return None


def _merged(module: Any, layer: Layer, stem: str, label: str, scale: float) -> dict[str, Tensor]:
    """Return a layer's new parameters."""
    if layer.keys() & {"b_norm", "diff_b"} and getattr(module, "bias", None) is None:
        raise UsageError(
            f"{label} does not fit this model: it changes the bias of {stem}, which has none; it was made for "
            "another base"
        )
    try:
        weight, parameters = module.weight.detach().float(), dict[str, Tensor]()
        update = _update(layer, weight)
        if "dora_scale" in layer:
            parameters["weight"] = weight + scale * (_decomposed(weight + update, layer["dora_scale"]) - weight)
        elif "w_norm" in layer or layer.keys() - {"b_norm", "diff_b", "alpha"}:
            parameters["weight"] = weight + scale * update
        if bias := layer.keys() & {"b_norm", "diff_b"}:
            parameters["bias"] = module.bias.detach().float() + scale * layer[bias.pop()]
    except KeyError as error:
        raise UsageError(
            f"{label} is damaged: {stem} lacks its {error.args[0]}; download or export it again"
        ) from error
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{label} does not fit this model: {stem} has tensors of other shapes ({reason}); it was made for another "
            "base, or it is damaged"
        ) from error
    return parameters


def _update(layer: Layer, weight: Tensor) -> Tensor:
    """Return the difference of a layer's weight, in its shape."""
    for name in ("w_norm", "diff"):
        if name in layer:
            return _shaped(layer[name], weight)
    if any(name.startswith("hada") for name in layer):
        first, second = (_factors(layer, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        rank = len(layer["hada_w1_b"])
        update = first * second
    elif any(name.startswith("lokr") for name in layer):
        first = layer.get("lokr_w1")
        first = layer["lokr_w1_a"] @ layer["lokr_w1_b"] if first is None else first
        second = layer.get("lokr_w2")
        second = _factors(layer, "lokr_w2_a", "lokr_w2_b", "lokr_t2") if second is None else second
        # Without factors there is no rank, and LyCORIS ignores alpha.
        ranks = [layer[name].shape[1] for name in ("lokr_w1_a",) if name in layer]
        ranks += [len(layer["lokr_w2_b"])] if "lokr_w2_b" in layer else []
        rank = ranks[0] if ranks else None
        update = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())
    elif "lora_up.weight" in layer:
        up, down = layer["lora_up.weight"], layer["lora_down.weight"]
        rank = len(down)
        if "lora_mid.weight" in layer:
            update = torch.einsum("oj,ji...,ic->oc...", up.flatten(1), layer["lora_mid.weight"], down.flatten(1))
        else:
            update = up.flatten(1) @ down.flatten(1)
    else:
        return torch.zeros_like(weight)
    factor = 1.0 if rank is None else float(layer.get("alpha", torch.tensor(float(rank)))) / rank
    return factor * _shaped(update, weight)


def _shaped(update: Tensor, weight: Tensor) -> Tensor:
    """Return an update in the shape of a weight. The outputs must agree: a transposed matrix has as many elements."""
    if len(update) != len(weight):
        raise RuntimeError(f"{len(update)} outputs for {len(weight)}")
    return update.reshape(weight.shape)


def _factors(layer: Layer, a: str, b: str, tucker: str) -> Tensor:
    """Return a b, or with Tucker's core t (r, r, k, k) the sum over i, j of a[i, O] t[i, j] b[j, I]."""
    if tucker in layer:
        return torch.einsum("ij...,io,jc->oc...", layer[tucker], layer[a], layer[b])
    return layer[a] @ layer[b].flatten(1)


def _decomposed(merged: Tensor, magnitude: Tensor) -> Tensor:
    """Return a merged weight with DoRA's magnitudes, per output or per input (Liu et al. 2024, Eq. 5)."""
    if magnitude.ndim == 1 and len(magnitude) > 1:  # without axes, as peft stores it: per output
        if len(magnitude) != len(merged):
            raise RuntimeError(f"{len(magnitude)} magnitudes for {len(merged)} outputs")
        magnitude = magnitude.reshape(-1, *[1] * (merged.ndim - 1))
    if magnitude.ndim not in (0, merged.ndim):
        raise RuntimeError(f"magnitudes of {magnitude.ndim} dimensions for a weight of {merged.ndim}")
    axis = 0 if magnitude.shape[0] == merged.shape[0] else 1
    sides = [side for side in range(merged.ndim) if side != axis]
    return merged * (
        magnitude / torch.linalg.vector_norm(merged, dim=sides, keepdim=True).clamp(min=torch.finfo(merged.dtype).tiny)
    )
