"""Text encoders: complete ones, and replacements for a teacher's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lcmdistill.teachers.compat import dtype_option
from lcmdistill.teachers.folders import check_kernels
from lcmdistill.teachers.hub_session import is_caused_by, limited_waiting
from lcmdistill.teachers.naming import is_local
from lcmdistill.teachers.registry import family_of_class
from lcmdistill.teachers.single_file.inspect import read_header
from lcmdistill.teachers.single_file.weights import (
    CheckpointFile,
    Sources,
    clip_sources,
    openclip_sources,
    without_weights,
)
from lcmdistill.utils.errors import RunError, UsageError

CLIP_PREFIXES = ("", "transformer.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
"what may precede the keys of a CLIP text encoder in a file"

OPENCLIP_PREFIXES = ("", "model.", "cond_stage_model.model.", "conditioner.embedders.1.model.")
"what may precede the keys of an OpenCLIP text encoder in a file"


def replace_text_encoders(pipeline: Any, encoders: Sequence[str], *, allow_pickle: bool = False) -> None:
    """Replace a pipeline's text encoders.

    Args:
        pipeline: A pipeline with text encoders.
        encoders: One per text encoder of the pipeline, in its order: a .safetensors file, or a diffusers folder or hub id of
            an encoder or of a pipeline. A single pipeline replaces all of them.
        allow_pickle: Whether to open pickled weights.

    Raises:
        UsageError: There is no such encoder, or the network was trained with another kind.
        RunError: The hub cannot be reached.
    """
    family = family_of_class(type(pipeline).__name__)
    names = [name for name in (family.text_encoders if family else ()) if pipeline.components.get(name) is not None]
    words = list(encoders)
    if len(words) == 1 and len(names) > 1 and not Path(words[0]).expanduser().is_file():
        words *= len(names)  # of a whole pipeline
    if not names or len(words) != len(names):
        raise UsageError(
            f"--text-encoder: {len(encoders)} were passed, and a {type(pipeline).__name__} has {len(names)}"
            f"{f' ({chr(44).join(names)})' if names else ''}; pass one per text encoder, in this order"
        )
    for name, word in zip(names, words, strict=True):
        current = getattr(pipeline, name)
        replacement = _load(word, name, current, allow_pickle).eval().requires_grad_(False)
        for what in ("hidden_size", "vocab_size", "projection_dim"):
            mine, theirs = (getattr(each.config, what, None) for each in (current, replacement))
            if mine != theirs and (what != "projection_dim" or hasattr(current, "text_projection")):
                raise UsageError(
                    f"--text-encoder {word} has a {what} of {theirs} and the teacher's network was trained on {mine}; use a "
                    "text encoder of its kind"
                )
        pipeline.register_modules(**{name: replacement})


def _load(word: str, name: str, current: Any, allow_pickle: bool, *, local_only: bool = False) -> Any:
    """Return a text encoder of the current one's class in fp32; local_only: without asking the hub."""
    path, kind = Path(word).expanduser(), type(current)
    if path.is_file():
        return _from_file(path, current)
    if not path.is_dir() and is_local(word):
        raise UsageError(
            f"--text-encoder {word} does not exist; use a diffusers folder, a .safetensors file or a hub id"
        )
    options: dict[str, Any] = {"use_safetensors": None if allow_pickle else True, **dtype_option(torch.float32)}
    if local_only:
        options["local_files_only"] = True
    source: Any = word
    if path.is_dir():
        source = path if (path / "config.json").is_file() else path / name
    try:
        with limited_waiting():
            try:
                encoder, report = _open(kind, source, options)
            except OSError as error:
                if path.is_dir() or is_caused_by(error, "HubStalled"):
                    raise
                options["subfolder"] = name  # of a whole pipeline on the hub
                encoder, report = _open(kind, source, options)
    except Exception as error:  # a loader raises whatever it meets in folders of another kind
        reason = str(error).strip().split("\n")[0]
        if is_caused_by(error, "HubStalled") and not local_only:
            return _load(word, name, current, allow_pickle, local_only=True)
        unreachable = ("couldn't connect", "offline", "connection")
        if not path.exists() and (local_only or any(sign in reason.lower() for sign in unreachable)):
            raise RunError(f"--text-encoder {word} is not in the local cache and the hub cannot be reached") from error
        raise UsageError(f"--text-encoder {word} cannot be read as a {kind.__name__}: {reason}") from error
    if missing := sorted(key for key in report["missing_keys"] if not key.endswith("position_ids")):
        raise UsageError(
            f"--text-encoder {word} lacks {len(missing)} weights, such as {missing[0]}; use a complete one"
        )
    return encoder


def _open(kind: Any, source: Any, options: Mapping[str, Any]) -> Any:
    """Return a text encoder and the report on its weights, once its configuration names no code."""
    where = {key: options[key] for key in ("subfolder", "local_files_only") if key in options}
    check_kernels("config.json", kind.config_class.get_config_dict(source, **where)[0])
    return kind.from_pretrained(source, output_loading_info=True, **options)


def _from_file(path: Path, current: Any) -> Any:
    """Return the text encoder of a file, with the current one's config: under transformers' names or OpenCLIP's."""
    if path.suffix != ".safetensors":
        raise UsageError(f"--text-encoder {path} is not a .safetensors file; a pickle can run any code when opened")
    if not hasattr(current.config, "max_position_embeddings"):
        raise UsageError(f"--text-encoder {path}: files are read for CLIP only; pass the folder of the text encoder")
    header = read_header(path)
    encoder = without_weights(lambda: type(current)(current.config))
    choices = [clip_sources(encoder, prefix) for prefix in CLIP_PREFIXES]
    choices += [openclip_sources(encoder, prefix) for prefix in OPENCLIP_PREFIXES]

    def held(sources: Sources) -> int:
        return sum(any(each.key in header.tensors for each in options) for options in sources.values())

    best = max(choices, key=held)
    if not held(best):
        raise UsageError(f"--text-encoder {path} holds no CLIP text encoder in a known layout")
    return CheckpointFile(path, header).fill(encoder, best, "text encoder")


def missing_text_weights(encoder: Any) -> list[str]:
    """Return the weights of a text encoder that its safetensors files lack; [] if it was read from a pickle."""
    prefixes = ("text_model.", f"{encoder.base_model_prefix}.")
    stored: dict[str, list[int]] = {}
    for path in Path(encoder.config._name_or_path).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {_bare(key, prefixes): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    if not stored:
        return []
    state = {_bare(key, prefixes): value for key, value in encoder.state_dict().items()}
    # Compared by memory, since shared embeddings have several names and a file holds one of them.
    loaded = {value.data_ptr() for key, value in state.items() if stored.get(key) == list(value.shape)}
    return [key for key, value in state.items() if value.data_ptr() not in loaded]


def _bare(key: str, prefixes: Sequence[str]) -> str:
    """Return a key without the wrapper prefixes that some versions of transformers write."""
    for prefix in prefixes:
        key = key.removeprefix(prefix)
    return key
