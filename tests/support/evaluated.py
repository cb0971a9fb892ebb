"""Evaluations of the tests: read their results, and shorten what does not matter to them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.evaluation import results as results_module
from lcmdistill.evaluation import self_consistency, sweep
from lcmdistill.evaluation.results import Results, read_results


def results_of(run: Path) -> Results:
    results = read_results(run)
    assert results is not None
    return results


def shorten_references(patched: pytest.MonkeyPatch) -> None:
    """Let the references take 12 steps instead of 50, and the self-consistency curve have 3 points of 2 images."""
    for module in (sweep, results_module):
        patched.setattr(module, "TEACHER_STEPS", 12)
    patched.setattr(self_consistency, "POINTS", 3)
    patched.setattr(self_consistency, "IMAGES", 2)


def noise_weights(run: Path, size: float) -> None:
    """Add noise to every weight of a run's student, of `size` times the weight's standard deviation."""
    path = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if value.numel() > 1:
            tensors[name] = value + size * value.std() * torch.randn(value.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    (run / "pipeline" / ".checksums.json").unlink()
