"""What a scorer is, and where its weights are found. Nothing is downloaded, and no pickle is executed.

Shapes: B images, H W pixels.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lcmdistill.evaluation.metrics.base import ImagePair, Metric, eight_bit, mean
from lcmdistill.utils.errors import RunError, UsageError

ScoreFunction = Callable[[Tensor, Sequence[str]], Tensor]
"uint8 images, (B, 3, H, W) on the CPU, and their B prompts to scores, (B,)"


@dataclass(frozen=True)
class Scorer:
    """A model that rates single images.

    Attributes:
        key: The name in `--scorer NAME=MODEL` and in the results.
        label: The name in tables and charts.
        description: What the number shows, in one sentence.
        measured_on: What the model is.
        limits: What it cannot see or was not made for, in one sentence.
        weights: What to pass as MODEL, and where it is published.
        compared_with: What an image is rated by.
        load: The model's files and a device to a function that rates images.
        decimals: How many decimals are recorded.
    """

    key: str
    label: str
    description: str
    measured_on: str
    limits: str
    weights: str
    load: Callable[[str, torch.device], ScoreFunction]
    compared_with: Literal["the prompt", "nothing"] = "the prompt"
    decimals: int = 3


def scorer_metric(scorer: Scorer, word: str, device: torch.device) -> Metric:
    """Return the mean score of a set of images, with its standard error.

    Args:
        scorer: The scorer.
        word: Its weights: a local path or a cached hub id.
        device: The device that computes it.

    Raises:
        UsageError: The weights are of another kind.
        RunError: The weights are neither there nor in the hub's local cache.
    """
    score = scorer.load(word, device)

    def per_image(pair: ImagePair) -> Tensor:
        return score(eight_bit(pair.pixels).cpu(), pair.prompts).view(-1, 1)

    return Metric(
        scorer.label,
        "higher",
        scorer.description,
        scorer.measured_on,
        scorer.compared_with,
        per_image,
        mean,
        published="comparable for the same weights and prompts",
        decimals=scorer.decimals,
        standard_error=lambda values: float(values.std() / len(values) ** 0.5),
        limits=scorer.limits,
    )


def cached_snapshot(hub_id: str) -> Path | None:
    """Return the folder of a repository in the hub's local cache; None if it is not there, or for a malformed id."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except Exception:  # of several kinds, by the version
        return None


def local_folder(word: str, scorer: str, weights: str) -> Path:
    """Return the folder of a model: a local one, or that of a hub id in the local cache.

    Args:
        word: A local path or a hub id.
        scorer: The scorer's key, for error messages.
        weights: What to pass, for error messages.

    Raises:
        RunError: It is neither.
    """
    path = Path(word).expanduser()
    folder = path if path.is_dir() else cached_snapshot(word)
    if folder is None:
        raise RunError(
            f"--scorer {scorer}={word} is neither a local path nor in the local hub cache; pass {weights} (hf download "
            "puts it into the cache)"
        )
    return folder


def weights_file(word: str, names: Sequence[str], scorer: str, weights: str) -> Path:
    """Return the file of weights that a word stands for: itself, or the first of `names` in its folder.

    Args:
        word: A file, a folder or a cached hub id.
        names: The published file's names, best first.
        scorer: The scorer's key, for error messages.
        weights: What to pass, for error messages.

    Raises:
        UsageError: The folder has no such file.
        RunError: The word is neither a path nor a cached hub id.
    """
    path = Path(word).expanduser()
    if path.is_file():
        return path
    folder = local_folder(word, scorer, weights)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"--scorer {scorer}={word} holds none of {', '.join(names)}; pass {weights}")


def companion(weights: Path, names: Sequence[str], hub_id: str) -> Path | None:
    """Return what a scorer needs besides its weights: the first of `names` next to them, or a cached hub id's folder."""
    beside = (weights.parent / name for name in names)
    return next((path for path in beside if path.exists()), None) or cached_snapshot(hub_id)


def read_tensors(path: Path, scorer: str) -> Mapping[str, Any]:
    """Read a file of tensors without executing a pickle.

    Raises:
        UsageError: The file holds code or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        values = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UsageError(
            f"--scorer {scorer}={path} cannot be read as tensors only, and pickled code is not executed; pass the published "
            "file, or its tensors as .safetensors"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"--scorer {scorer}={path} holds a {type(values).__name__} instead of named tensors")
    return values


def fill(module: torch.nn.Module, state: Mapping[str, Tensor], path: Path, scorer: str) -> None:
    """Load all weights of a module, in fp32.

    Raises:
        UsageError: A weight is missing, unknown or of another shape.
    """
    try:
        module.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UsageError(f"--scorer {scorer}={path} has other weights than the published model: {reason}") from error
    module.eval().requires_grad_(False)
