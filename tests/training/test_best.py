"""The best validation, the warnings, and the advice at the end of a run."""

import json
from pathlib import Path

import pytest
import torch

from lcmdistill.training.best import (
    best_checkpoint_advice,
    best_of,
    compared_with_untrained,
    history,
    keep_best,
    quality_warning,
    restore_best,
)
from lcmdistill.utils.checkpoint import BEST, load_best, prune, save_checkpoint
from lcmdistill.utils.run_dir import checkpoints


def validated(*values: float) -> list[tuple[int, float]]:
    return [(100 * i, value) for i, value in enumerate(values)]


def written(run: Path, metric: str, *values: float) -> Path:
    """Write a run folder whose metrics.jsonl holds these validations between lines of training."""
    lines = [json.dumps({"step": step, f"val/{metric}": value}) for step, value in validated(*values)]
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 5, "loss": 1.0})]) + "\n")
    return run


def test_the_best_is_low_for_a_distance_and_high_for_a_similarity():
    assert best_of("rmse_4", validated(0.9, 0.5, 0.6)) == (100, 0.5)
    assert best_of("ssim_4", validated(0.2, 0.7, 0.6)) == (100, 0.7)
    assert best_of("rmse_4", validated(0.5, 0.5)) == (0, 0.5)


@pytest.mark.parametrize(
    ("metric", "values", "warning"),
    [
        ("rmse_4", (0.9,), None),
        ("rmse_4", (0.9, 0.8, 0.7, 0.6), None),
        ("rmse_4", (0.9, 0.5, 0.6), None),  # a single one may be chance
        (
            "rmse_4",
            (0.9, 0.5, 0.6, 0.7),
            "quality is dropping: rmse_4 was best at step 100 (0.5) and is 0.7 at step 300",
        ),
        ("rmse_4", (0.9, 0.5, 0.501, 0.5, 0.502), "quality has plateaued: rmse_4 was best at step 100 (0.5)"),
        ("ssim_4", (0.2, 0.7, 0.6, 0.55), "quality is dropping: ssim_4 was best at step 100 (0.7) and is 0.55"),
        ("ssim_4", (0.2, 0.7, 0.69, 0.72, 0.75), None),
    ],
)
def test_a_drop_and_a_plateau_are_reported(metric: str, values: tuple[float, ...], warning: str | None):
    found = quality_warning(metric, validated(*values))
    assert (found is None) if warning is None else (found or "").startswith(warning)


@pytest.mark.parametrize("saved", [None, 100, 200, "damaged"])
def test_a_resumed_run_saves_the_best_weights_that_a_kill_kept_it_from(tmp_path: Path, saved: int | str | None):
    run, weights = written(tmp_path / "run", "rmse_4", 0.9, 0.6, 0.5), {"w": torch.ones(2)}
    if saved is not None:
        step = saved if isinstance(saved, int) else 100
        save_checkpoint(run / "checkpoints", step, {"weights": {"w": torch.zeros(2)}}, {}, name=BEST)
    if saved == "damaged":
        (run / "checkpoints" / BEST / "state.pt").write_bytes(b"x")
    restore_best(run, "rmse_4", 100, {"w": torch.full((2,), 7.0)})  # not the best
    restore_best(run, "rmse_4", 200, weights)
    best = load_best(run)
    assert best is not None
    assert (best[0], float(best[1]["w"][0])) == (200, 0.0 if saved == 200 else 1.0)


def test_a_warning_is_reported_once(tmp_path: Path):
    weights = {"w": torch.ones(2)}
    warnings = []
    values = (0.9, 0.5, 0.6, 0.7, 0.8)
    for i in range(len(values)):
        warnings.append(keep_best(written(tmp_path / "run", "rmse_4", *values[: i + 1]), "rmse_4", 100 * i, weights))
    assert [text is not None for text in warnings] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("metric", "values", "text"),
    [
        ("rmse_4", (0.9,), None),
        ("rmse_4", (0.9, 0.8), "better than untrained since step 100"),
        ("rmse_4", (0.9, 1.0, 0.8, 0.7), "better than untrained since step 200"),
        ("rmse_4", (0.9, 0.8, 1.0, 0.7), "better than untrained since step 300"),
        ("rmse_4", (1.05, 1.1, 1.15), "not better than untrained (rmse_4 1.05 at step 0, and 1.15 now)"),
        ("ssim_4", (0.2, 0.3), "better than untrained since step 100"),
    ],
)
def test_a_validation_is_compared_with_the_untrained_student(metric: str, values: tuple[float, ...], text: str | None):
    assert compared_with_untrained(metric, validated(*values)) == text


def test_the_best_weights_outlive_pruning(tmp_path: Path):
    run = tmp_path / "run"
    for i, values in enumerate([(0.9,), (0.9, 0.5), (0.9, 0.5, 0.6), (0.9, 0.5, 0.6, 0.4), (0.9, 0.5, 0.6, 0.4, 0.4)]):
        keep_best(written(run, "rmse_4", *values), "rmse_4", 100 * i, {"w": torch.full((2,), float(i))})
        save_checkpoint(run / "checkpoints", 100 * i, {}, {})
        prune(run / "checkpoints", 1)
        found = load_best(run)
        assert (found and found[0]) == (None, 100, 100, 300, 300)[i]
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000400"]
    assert (run / "checkpoints" / BEST).is_dir()
    assert load_best(run) == (300, {"w": pytest.approx(torch.full((2,), 3.0))})


def test_the_end_of_a_run_names_an_earlier_best(tmp_path: Path):
    worse = written(tmp_path / "worse", "ssim_4", 0.2, 0.75, 0.7)
    assert best_checkpoint_advice(worse, "ssim_4") == (
        "the best validation was at step 100 (ssim_4 0.75, and 0.7 at step 200); export its weights with --weights best"
    )
    assert best_checkpoint_advice(written(tmp_path / "good", "ssim_4", 0.2, 0.7, 0.75), "ssim_4") is None
    assert best_checkpoint_advice(written(tmp_path / "bad", "ssim_4", 0.8, 0.7, 0.6), "ssim_4") == (
        "no validation was better than that of the untrained student (ssim_4 0.8, and 0.6 at step 200); train longer, or use "
        "a lower learning rate"
    )
    assert best_checkpoint_advice(written(tmp_path / "one", "ssim_4", 0.8), "ssim_4") is None
    assert history(worse, "none") == []
