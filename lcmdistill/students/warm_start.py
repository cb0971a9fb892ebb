"""`student.start`: begin from the weights of another run, or from a LoRA, instead of from the teacher.

Shapes: r rank, I inputs and O outputs of a layer.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.config.schema import StudentConfig
from lcmdistill.objectives.recorded import load_run_config
from lcmdistill.students.student import Student
from lcmdistill.teachers.base import Teacher, has_omega_input
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.lora.adapters import LoraLayer, lora_layers
from lcmdistill.teachers.lora.files import Lora, load_lora
from lcmdistill.teachers.single_file.inspect import LORA_DOWNS, read_header
from lcmdistill.utils.errors import UsageError

WORDS = ("teacher", "scratch")
"the values of `student.start` that are not a path"

_NAME = "start"


def check_start(start: str, student: StudentConfig) -> None:
    """Raise UsageError unless a start exists, holds a student of the same kind, and a LoRA has no higher rank."""
    if start in WORDS:
        return
    kind = student.kind
    path = Path(start).expanduser()
    if not path.exists():
        raise UsageError(f"--start {start} does not exist; pass a run folder, or a LoRA's file")
    config = load_run_config(path) if path.is_dir() else None
    found = config.student.kind if config is not None else kind
    if found != kind:
        command = "distill-lora" if found == "lora" else "distill"
        raise UsageError(
            f"--start {start} is {'a LoRA' if found == 'lora' else 'a full student'}; start from it with lcmdistill {command}, "
            "or merge it with its base first: lcmdistill export"
        )
    if config is not None and config.student.lora_relative_to == "base":
        raise UsageError(
            f"--start {start} is a LoRA that also contains the LoRAs of its teacher (student.lora_relative_to is base), and "
            "would add them twice; start from a run that is relative to its teacher"
        )
    if kind == "lora":
        _check_rank(start, _rank(path) if config is None else config.student.rank, student.rank)


def _rank(path: Path) -> int:
    """Return the highest rank of a LoRA file; 0 if it is not known from its header."""
    if path.suffix != ".safetensors":
        return 0
    return max(
        (shape[0] for name, (_, shape) in read_header(path).tensors.items() if name.endswith(LORA_DOWNS)), default=0
    )


def _check_rank(start: str, given: int, rank: int) -> None:
    if given > rank:
        raise UsageError(f"--start {start} has rank {given} and this run {rank}; pass --rank {given} --alpha {given}")


def start_lora(teacher: Teacher, start: str) -> Lora:
    """Return the updates of a LoRA file, or of a run's LoRA, by the paths of the teacher's layers.

    Args:
        teacher: The teacher, whose network has no adapter; it has none afterwards.
        start: A path.

    Raises:
        UsageError: The LoRA does not fit the teacher, or is not a plain LoRA of its network.
    """
    folder = Path(start).expanduser() / "lora"
    file = str(folder if folder.is_dir() else Path(start).expanduser())
    if not load_lora(teacher.pipeline, file, _NAME, option="--start"):
        raise UsageError(f"--start {start} is a LyCORIS file, which cannot be trained further; start from a plain LoRA")
    others = [
        name
        for name, part in teacher.pipeline.components.items()
        if isinstance(part, torch.nn.Module) and part is not teacher.network and lora_layers(part)
    ]
    if others:
        raise UsageError(
            f"--start {start} also has layers of the {others[0]}, which is not trained; start from another LoRA"
        )
    lora = {path: _layer(layer) for path, layer in lora_layers(teacher.network).items() if _NAME in layer.lora_A}
    _remove_adapters(teacher.network)
    return lora


def _layer(layer: Any) -> LoraLayer:
    down, up = (part[_NAME].weight.detach().float().clone() for part in (layer.lora_A, layer.lora_B))
    return LoraLayer(down, up, float(layer.scaling[_NAME]) * len(down))


def _remove_adapters(network: Any) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config
    network._hf_peft_config_loaded = False


@torch.no_grad()
def put_start_lora(student: Student, lora: Lora, start: str, alpha: float) -> None:
    """Copy updates into a student's adapter and into its average.

    A smaller rank leaves the other rows of the student's `down` as they were initialized, with an `up` of zeros.

    Args:
        student: A LoRA student.
        lora: What `start_lora` returned.
        start: Its path, for messages.
        alpha: The student's alpha.

    Raises:
        UsageError: The student lacks a layer, or the rank to hold it.
    """
    paths = {name.rpartition(".")[0] for name in student.trainable}
    absent = sorted(lora.keys() - paths)
    if absent:
        raise UsageError(
            f"--start {start} has {len(absent)} layers that this run does not train, such as {absent[0]}; add them with "
            "--target-modules"
        )
    for path, layer in lora.items():
        ours = student.trainable[f"{path}.lora_A"]
        rank, given = len(ours), len(layer.down)
        _check_rank(start, given, rank)
        scale = (layer.alpha / given) / (alpha / rank)
        for parameters in filter(None, (student.trainable, student.averaged)):
            down, up = parameters[f"{path}.lora_A"], parameters[f"{path}.lora_B"]
            down[:given] = layer.down.view(given, *down.shape[1:])
            up.zero_()
            up[:, :given] = scale * layer.up.view(len(up), given, *up.shape[2:])


def start_weights(teacher: Teacher, start: str) -> dict[str, Tensor]:
    """Return the weights of a full student: a run's, or any model's that can be a teacher.

    Raises:
        UsageError: They are not those of the teacher's architecture.
    """
    network = load_teacher(str(Path(start).expanduser())).network
    if has_omega_input(network) and not has_omega_input(teacher.network):
        raise UsageError(
            f"--start {start} takes guidance as an input of the network, and students of this method do not; bake it into the "
            "weights first: lcmdistill export RUN --format single-file --guidance-scale 4 --output start.safetensors"
        )
    weights, ours = network.state_dict(), teacher.network.state_dict()
    different = sorted(weights.keys() ^ ours.keys()) + [
        name for name in weights.keys() & ours.keys() if weights[name].shape != ours[name].shape
    ]
    if different:
        raise UsageError(
            f"--start {start} has another architecture than the teacher ({len(different)} tensors differ, such as "
            f"{different[0]}); start from a student of this teacher"
        )
    return weights


@torch.no_grad()
def put_start_weights(student: Student, weights: dict[str, Tensor]) -> None:
    """Copy weights into a full student and into its average."""
    for parameters in filter(None, (student.trainable, student.averaged)):
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    student.refresh()
