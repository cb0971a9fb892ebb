"""What the file of a LoRA run holds: the adapter, or the adapter together with the LoRAs that its teacher was fused with."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lcmdistill.config.schema import RunConfig, TeacherConfig
from lcmdistill.teachers.lora.adapters import padded
from lcmdistill.teachers.lora.files import Lora
from lcmdistill.teachers.lora.fuse import concatenated, low_rank_updates
from lcmdistill.teachers.registry import family_of


def written_lora(lora: Lora, config: RunConfig, pipeline: Any) -> Mapping[str, Lora]:
    """Return the LoRA that a run writes, {component: LoRA}, all of one rank and alpha.

    An adapter relative to the base is the sum of the teacher's LoRAs and of the trained one, exactly: their matrices are put
    next to each other.

    Args:
        lora: The trained adapter.
        config: The run's settings.
        pipeline: A pipeline of the teacher's architecture, whose weights are not read.
    """
    network = family_of(pipeline).network
    if config.student.lora_relative_to == "teacher":
        return {network: lora}
    parts = low_rank_updates(pipeline, config.teacher.loras or ())
    of_network = parts.setdefault(network, {})
    for path, layer in lora.items():
        of_network[path] = concatenated([of_network[path], layer] if path in of_network else [layer])
    rank = max(len(layer.down) for layers in parts.values() for layer in layers.values())
    return {part: padded(layers, rank) for part, layers in parts.items()}


def base_of_file(config: RunConfig) -> TeacherConfig:
    """Return the model that the LoRA of a run is an addition to: its teacher, or the base without the teacher's LoRAs."""
    if config.student.lora_relative_to == "teacher":
        return config.teacher
    return replace(config.teacher, loras=None, lora_checksums=None)
