"""Fuse LoRAs into the weights of a teacher when it is loaded, and state what they add as low-rank updates.

Shapes: r rank, I inputs and O outputs of a layer.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from lcmdistill.config.lora_words import split_lora
from lcmdistill.teachers.lora.adapters import LoraLayer
from lcmdistill.teachers.lora.checks import known_prefixes
from lcmdistill.teachers.lora.files import lora_weights_file, read_kohya_form
from lcmdistill.teachers.lora.kinds import kinds_of
from lcmdistill.teachers.lora.lycoris import low_rank, merge_lycoris, split_layers
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.errors import UsageError

OPTION = "--teacher-lora"


def lora_checksums(loras: Sequence[str]) -> tuple[str, ...]:
    """Return the SHA-256 of each LoRA's file, of which Civitai shows the first ten digits.

    Args:
        loras: As `teacher.loras` names them. For a peft folder its settings count, too.

    Raises:
        UsageError: A file does not exist.
    """
    checksums = []
    for word in loras:
        path = split_lora(word).path
        file = lora_weights_file(path, f"{OPTION} {path}")
        sha256 = hashlib.sha256()
        for each in (file, file.with_name("adapter_config.json")):
            if each.is_file():
                with each.open("rb") as opened:
                    while block := opened.read(2**22):
                        sha256.update(block)
        checksums.append(sha256.hexdigest())
    return tuple(checksums)


def check_files(loras: Sequence[str]) -> None:
    """Raise UsageError for a LoRA whose file does not exist. loras: as `teacher.loras` names them."""
    for path, _ in map(split_lora, loras):
        lora_weights_file(path, f"{OPTION} {path}")


def fuse_loras(pipeline: Any, loras: Sequence[str], checksums: Sequence[str] | None = None) -> None:
    """Merge LoRAs into the weights of a pipeline's network and text encoders, one after the other.

    Args:
        pipeline: The pipeline to change.
        loras: As `teacher.loras` names them.
        checksums: Those that a run recorded; None accepts any content.

    Raises:
        UsageError: A file does not exist, has changed, holds no LoRA, or does not fit the model.
    """
    if checksums is not None:
        check_unchanged(loras, checksums)
    for path, scale in map(split_lora, loras):
        label = f"{OPTION} {path}"
        weights = read_kohya_form(pipeline, path, label)
        merge_lycoris(pipeline, known_prefixes(family_of(pipeline)), weights, label, scale)


def check_unchanged(loras: Sequence[str], checksums: Sequence[str]) -> None:
    """Raise UsageError unless the LoRAs have the recorded checksums."""
    if len(loras) != len(checksums):
        raise UsageError(
            f"teacher.lora_checksums has {len(checksums)} entries for {len(loras)} LoRAs; remove it, or list one per LoRA"
        )
    for word, recorded, found in zip(loras, checksums, lora_checksums(loras), strict=True):
        if recorded != found:
            raise UsageError(
                f"{OPTION} {split_lora(word).path} has changed: its SHA-256 begins with {found[:10]}, and {recorded[:10]} is "
                "recorded; restore the file, or start a new run"
            )


def check_low_rank(loras: Sequence[str]) -> None:
    """Raise UsageError unless every LoRA is a plain one, whose update another LoRA can contain exactly."""
    from safetensors import safe_open

    for path, _ in map(split_lora, loras):
        with safe_open(lora_weights_file(path, f"{OPTION} {path}"), framework="pt") as file:
            keys = file.keys()
        if kinds := kinds_of(keys):
            raise UsageError(
                f"student.lora_relative_to is base, but {OPTION} {path} is of the kind {kinds[0]}, which a LoRA cannot contain "
                "exactly; use --lora-relative-to teacher, or lcmdistill distill"
            )


def low_rank_updates(pipeline: Any, loras: Sequence[str]) -> dict[str, dict[str, LoraLayer]]:
    """Return what plain LoRAs add to a model together, {component: {path: update}}, with alpha = r.

    The rank of an update is the sum of the ranks of the LoRAs that change its layer.

    Args:
        pipeline: A pipeline of the base's architecture, whose weights are not read.
        loras: As `teacher.loras` names them.

    Raises:
        UsageError: As `fuse_loras` and `check_low_rank` do.
    """
    check_low_rank(loras)
    updates: dict[str, dict[str, LoraLayer]] = {}
    for path, scale in map(split_lora, loras):
        label = f"{OPTION} {path}"
        weights = read_kohya_form(pipeline, path, label)
        for _, target, layer in split_layers(pipeline, known_prefixes(family_of(pipeline)), weights, label):
            update = low_rank(target.module, layer, scale)
            of_part = updates.setdefault(target.part, {})
            of_part[target.path] = concatenated([of_part[target.path], update] if target.path in of_part else [update])
    return updates


def concatenated(layers: Sequence[LoraLayer]) -> LoraLayer:
    """Return the sum of low-rank updates as one of the sum of their ranks, with alpha = r."""
    down = torch.cat([layer.down for layer in layers])
    up = torch.cat([layer.up * (layer.alpha / len(layer.down)) for layer in layers], 1)
    return LoraLayer(down, up, float(len(down)))
