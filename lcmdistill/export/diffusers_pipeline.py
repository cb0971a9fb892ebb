"""Write a student as a diffusers pipeline folder."""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lcmdistill.utils.atomic import atomic_dir


def save_pipeline(pipeline: Any, folder: Path, card: str) -> None:
    """Write a pipeline folder and its model card, whole or not at all; the weights keep the dtype they have."""
    with atomic_dir(folder) as aside:
        write_pipeline(pipeline, aside, card)


def write_pipeline(pipeline: Any, folder: Path, card: str) -> None:
    """Fill an existing folder with a pipeline and its model card; the weights keep the dtype they have."""
    # The checkpoint in memory came from a folder of its own; diffusers would warn that it is saved elsewhere.
    logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("text_encoder*/model.safetensors"):
        _loaded_in_fp32_by_default(path.with_name("config.json"))
        if "CLIPText" in path.with_name("config.json").read_text(encoding="utf-8"):
            _readable_by_transformers_4(path)
    checker = folder / "safety_checker" / "model.safetensors"
    if checker.is_file():
        _loaded_in_fp32_by_default(checker.with_name("config.json"))
        _readable_by_transformers_4(checker, "vision_model.", within="vision_model.")
    add_vocabularies(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def add_vocabularies(folder: Path) -> None:
    """Beside each tokenizer.json the vocab.json and merges.txt that transformers 4 reads; version 5 writes neither."""
    for path in folder.glob("tokenizer*/tokenizer.json"):
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        if path.with_name("vocab.json").exists() or model["type"] != "BPE":
            continue
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        path.with_name("vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        path.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _loaded_in_fp32_by_default(config: Path) -> None:
    """transformers 5 takes a config's dtype where none is asked for, diffusers takes fp32: half and float do not mix."""
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _readable_by_transformers_4(path: Path, prefix: str = "text_model.", within: str = "") -> None:
    """transformers >= 5.6 writes CLIP's keys flat; version 4 wants a prefix and else takes random weights.

    within: what the keys of the CLIP begin with, where it is a part of another model, as of a safety checker.
    """
    tensors = load_file(path)
    if not any(key.startswith(within + prefix) for key in tensors):
        bare = {key for key in tensors if key.startswith(within) and not key.startswith("text_projection")}
        named = {within + prefix + key.removeprefix(within) if key in bare else key: v for key, v in tensors.items()}
        save_file(named, path, metadata={"format": "pt"})
