"""Checkpoints as files: `step-N/` holds one safetensors file per group of tensors and a small `state.pt`."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.errors import RunError
from lcmdistill.utils.run_dir import checkpoints, step_name

BEST = "best"
"the folder beside the checkpoints"


def load_best(run: Path) -> tuple[int, dict[str, Tensor]] | None:
    """(step, weights) of the best validation; None if none was kept."""
    path = run / "checkpoints" / BEST
    if not (path / "state.pt").is_file():
        return None
    groups, state = load_checkpoint(path)
    return state["step"], groups["weights"]


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    name: str | None = None,
) -> Path:
    """Write `step-N` under `folder`, or another name. groups: name -> tensors; state: plain values and tensors only."""
    path = folder / (name or step_name(step))
    with atomic_dir(path) as aside:
        for name, tensors in groups.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside / f"{name}.safetensors")
        torch.save({"step": step, **state}, aside / "state.pt")
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(groups, state) of a checkpoint, on the CPU. Raises RunError on one that is damaged."""
    try:
        groups = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return groups, torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise RunError(
            f"the checkpoint {path} is damaged ({(str(error) or type(error).__name__).splitlines()[0]}); remove that folder, "
            "and the one before it is used"
        ) from error


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        # Renamed first: a removal that is cut off must not leave something that looks whole.
        doomed = path.rename(path.with_name(f".{path.name}.old"))
        shutil.rmtree(doomed)
