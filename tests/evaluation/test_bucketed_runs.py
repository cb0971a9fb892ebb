"""Runs with aspect-ratio buckets are validated and evaluated at the buckets' sizes, in turn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.latents import batches
from lcmdistill.evaluation.options import EvaluationOptions
from lcmdistill.evaluation.results import read_results
from lcmdistill.report.page import write_report
from tests.support.runs import distill, resolve

SIZES = [(16, 24), (24, 16)]
"height and width of the buckets"


@pytest.fixture
def bucketed_run(train_settings: dict[str, Any], tmp_path: Path) -> Path:
    settings = {**train_settings, "run.output": str(tmp_path / "run"), "run.validate_every": 2}
    settings |= {"data.buckets": ("16x24", "24x16"), "run.validation_prompts": ("red heart", "apple", "dog")}
    settings |= {"data.cache_dir": str(tmp_path / "cache"), "optim.max_train_steps": 2}
    return distill(resolve({}, settings))


def test_a_run_with_buckets_is_validated_and_evaluated_at_its_sizes(
    bucketed_run: Path, small_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcmdistill.evaluation.metrics.features.MIN_KID_IMAGES", 2)
    for i in range(3):
        height, width = SIZES[i % 2]
        assert Image.open(bucketed_run / "samples" / f"sample-{i}.png").size == (width, height)
    lines = [json.loads(line) for line in (bucketed_run / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/rmse_4" in line for line in lines) == 2
    options: dict[str, Any] = {"steps": (1, 2), "guidance_scales": (4.0,), "features": small_features, "device": "cpu"}
    evaluate([bucketed_run], EvaluationOptions(**options, num_images=3))
    results = read_results(bucketed_run)
    assert results is not None
    assert results.info["sizes"] == ["16x24", "24x16"]
    for paths in (results.previews("student", 2, 4.0), results.previews("teacher", 50, 4.0)):
        assert [Image.open(path).size for path in paths if path] == [(24, 16), (16, 24), (24, 16)]
    assert (results.full("rmse"), results.full("ssim")) == (0.0, 1.0)
    assert len(results.consistency) == 50
    assert "Image sizes (height x width): 16x24, 24x16." in write_report(bucketed_run).read_text()
    # Another batch size, and what is read back from the cache, give the same numbers.
    numbers = {name: point["numbers"] for name, point in results.points.items()}
    for path in (bucketed_run / "evaluation" / "points").glob("*/numbers.json"):
        path.unlink()
    evaluate([bucketed_run], EvaluationOptions(**options, num_images=3, batch_size=1))
    again = read_results(bucketed_run)
    assert again is not None
    for name, point in again.points.items():
        assert point["numbers"] == pytest.approx(numbers[name], rel=0.011, abs=0.0011)


def test_a_batch_has_one_size_and_every_image_is_in_one() -> None:
    mixed = [torch.full((1, *SIZES[i % 2]), float(i)) for i in range(5)]
    found = list(batches(mixed, 2))
    assert [indices for indices, _ in found] == [[0, 2], [4], [1, 3]]
    for indices, latents in found:
        assert latents[:, 0, 0, 0].tolist() == [float(i) for i in indices]
    square: Tensor = torch.arange(5.0).view(5, 1, 1, 1)
    assert [indices for indices, _ in batches(square, 2)] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([latents for _, latents in batches(square, 2)]), square)
