"""Inspect a diffusers folder before a library opens it: its parts, its weight files, and no code of its own."""

import codecs
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lcmdistill.teachers.registry import supported_classes
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

PICKLE_VARIABLE = "LCMDISTILL_ALLOW_PICKLE"
"the environment variable that lets every command open pickled weights"

_PICKLES = (".bin", ".pt", ".ckpt")

# The libraries whose classes a pipeline may name. diffusers imports any other one, or a module next to the weights.
_LIBRARIES = ("diffusers", "transformers")

_IMPLEMENTATION = re.compile("(?:attn|attention|experts)_implementation")
"the settings of transformers that may name a kernel"

WEIGHT_FILE = re.compile(r"[^.]+(?:\.(?P<variant>\w+?))?(?:-\d+-of-\d+)?\.safetensors")
"the name of a weight file, with its variant"


def check_folder(
    folder: Path, model: str, *, variant: str | None, allow_pickle: bool, dropped: Collection[str] = ()
) -> dict[str, Any]:
    """Check that a folder is a complete diffusers pipeline, and return its model_index.json.

    Args:
        folder: The folder of the pipeline.
        model: The name that the user knows it by, for messages.
        variant: The variant of the weight files, such as fp16.
        allow_pickle: Whether weights may be pickles.
        dropped: Parts that are left out, and need not be there.

    Raises:
        UsageError: The folder is incomplete, brings code of its own, or has weights of another kind.
    """
    index = read_index(folder)
    check_classes(model, index)
    parts = component_names(index) - set(dropped)
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise UsageError(f"{folder} is incomplete: model_index.json names {', '.join(missing)}, which is not there")
    for part in sorted(parts):
        _check_configs(folder / part)
        if part.startswith("tokenizer"):
            _check_tokenizer(folder / part)
        names = [path.name for path in (folder / part).iterdir()]
        is_safe = any(name.endswith(".safetensors") for name in names)
        if not is_safe and part != "safety_checker" and not allow_pickle and any(n.endswith(_PICKLES) for n in names):
            raise UsageError(
                f"{folder / part} holds pickled weights only, which can run any code when opened; convert them to "
                f"safetensors, or pass --set teacher.allow_pickle=true ({PICKLE_VARIABLE}=1 for other commands) if you "
                "trust their author"
            )
    if variant is None and (only := only_variant(folder)):
        raise UsageError(f"{model} has weights of the variant {only} only; pass --variant {only}")
    return index


def _check_configs(folder: Path) -> None:
    """Raise UsageError for a JSON file of a part that is damaged, of which libraries report something else or nothing."""
    for path in sorted(folder.glob("*.json")):
        values = _read_table(path)
        if path.name in ("config.json", "scheduler_config.json") and not isinstance(values.get("_class_name", ""), str):
            raise UsageError(f"{path} states {values['_class_name']!r} for its class, and not a name; restore the file")
        check_kernels(path, values)
    if any(folder.glob("*.safetensors")) and not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is incomplete: it has weights and no config.json; download it again")


def check_kernels(path: Path | str, values: Any) -> None:
    """Refuse a configuration that names a compiled kernel of the hub: transformers downloads it and runs its code.

    Args:
        path: What the configuration was read from, for messages.
        values: The configuration, or a part of it.

    Raises:
        UsageError: An implementation of attention or experts is a name such as owner/kernel.
    """
    for key, value in values.items() if isinstance(values, dict) else ():
        names = value.values() if isinstance(value, dict) else [value]
        if _IMPLEMENTATION.search(key) and any(isinstance(name, str) and "/" in name for name in names):
            raise UsageError(
                f"{path} states {value!r} for {key}, which is code of the hub, and code of a model is not run; remove the "
                "setting"
            )
        check_kernels(path, value)


def _read_table(path: Path) -> dict[str, Any]:
    """Return a JSON object of a downloaded pipeline.

    Raises:
        UsageError: The file is not a JSON object, or not as diffusers and transformers read one.
    """
    try:
        content = path.read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            raise UsageError(
                f"{path} starts with a byte-order mark, with which diffusers does not read it; save the file as UTF-8 "
                "without one"
            )
        table = parse_json(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}; restore the file") from error
    if not isinstance(table, dict):
        raise UsageError(f"{path} is not a table of settings; restore the file")
    return table


def _check_tokenizer(folder: Path) -> None:
    """Raise UsageError for a tokenizer without its vocabulary: transformers makes one that reads every word as unknown."""
    names = {path.name for path in folder.iterdir()}
    own = "tokenizer.json" in names or any(name.endswith(".model") for name in names)
    missing = [] if own else [name for name in ("vocab.json", "merges.txt") if name not in names]
    if missing := missing + [name for name in ("tokenizer_config.json",) if name not in names]:
        raise UsageError(f"{folder} is incomplete: it has no {' and no '.join(missing)}; download it again")
    if not own:
        _check_merges(folder)


def _check_merges(folder: Path) -> None:
    """Raise UsageError if merges.txt does not lead to the words of vocab.json: half of it would split words otherwise."""
    words = _read_table(folder / "vocab.json").keys()
    path = folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}; restore the file") from error
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    made = {"".join(pair) for pair in pairs}
    unknown = next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in words), None)
    lost = [word for word in words if len(word.removesuffix("</w>")) > 1 and word not in made and word[:1] != "<"]
    if unknown is not None or len(lost) > len(words) // 100:
        problem = f"{' '.join(unknown)!r} makes no word" if unknown else f"{len(lost)} words have no merge"
        raise UsageError(f"{path} does not belong to vocab.json ({problem}); download both again")


def pickles_allowed() -> bool:
    """Return whether the environment lets every command open pickled weights."""
    return os.environ.get(PICKLE_VARIABLE, "") not in ("", "0")


def read_index(folder: Path) -> dict[str, Any]:
    """Return a folder's model_index.json.

    Raises:
        UsageError: The file is missing, or does not describe a pipeline.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UsageError(f"{folder} is missing model_index.json, which a diffusers pipeline has at its top")
    index = _read_table(path)
    if "_class_name" not in index:
        raise UsageError(f"{path} does not describe a diffusers pipeline: it has no _class_name")
    return index


_PARTS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")

_NOT_A_PART = re.compile(r"Pipeline|^pipeline|^Auto(?!encoder)")
"classes that read further files to choose what to load"


def check_classes(model: str, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that names classes outside the known libraries, whatever the installed diffusers would do.

    Args:
        model: The model's name, for messages.
        index: Its model_index.json.

    Raises:
        UsageError: The pipeline, or a part of it, has a class of its own.
    """
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        name = ".".join(map(str, kind)) if isinstance(kind, list) else str(kind)
        raise UsageError(
            f"{model} has a custom pipeline class ({name}), and code of a model is not run; supported are "
            f"{', '.join(supported_classes())}"
        )
    for part, value in index.items():
        if isinstance(value, dict) or (part in _PARTS and not isinstance(value, list)):
            raise UsageError(
                f"model_index.json of {model} states {value!r} for its {part}, and not [library, class]; restore the file"
            )
        if part.startswith("_") or not isinstance(value, list) or value in ([], [None, None]):
            continue
        is_plain = len(value) == 2 and all(isinstance(name, str) and name.isidentifier() for name in value)
        # diffusers 0.35 runs the code that the folder of an inner pipeline names.
        if is_plain and _NOT_A_PART.search(value[1]):
            raise UsageError(
                f"{model} has a {value[1]} as its {part}, which chooses its classes itself, and code of a model is not run; "
                "name the class of a network, a tokenizer or a scheduler"
            )
        if not is_plain or not _is_known_library(value[0]):
            raise UsageError(
                f"{model} has a custom class for its {part} ({'.'.join(map(str, value))}), and code of a model is not run; "
                f"use classes of {' or '.join(_LIBRARIES)}"
            )


def _is_known_library(name: str) -> bool:
    """Return whether a name is a known library or, as in older files, a module of diffusers' pipelines."""
    from diffusers import pipelines

    return name in _LIBRARIES or (name in dir(pipelines) and hasattr(pipelines, name))


def component_names(index: Mapping[str, Any]) -> set[str]:
    """Return the names of the parts that a model_index.json lists, which are folders."""
    return {
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value and value[0]
    }


def sharded_pickles(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Return the parts of diffusers' classes whose weights are pickles in several files."""
    parts = [name for name in sorted(component_names(index)) if index[name][0] == "diffusers"]
    return [
        name
        for name in parts
        if any((folder / name).glob("*.bin.index.json")) and not any((folder / name).glob("*.safetensors"))
    ]


def only_variant(folder: Path) -> str | None:
    """Return the variant, such as fp16, that a part of a pipeline has weights of when it has no plain ones; otherwise None."""
    for part in sorted(component_names(read_index(folder)) - {"safety_checker"}):
        matches = [WEIGHT_FILE.fullmatch(path.name) for path in sorted((folder / part).glob("*.safetensors"))]
        variants = {match["variant"] or "" for match in matches if match}
        if variants and "" not in variants:
            return sorted(variants)[0]
    return None
