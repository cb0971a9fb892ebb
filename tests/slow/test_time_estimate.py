"""The time that the summary estimates is that of a run. Half a minute of computing: `make test-slow`."""

import time
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.training import cost_time, trainer
from lcmdistill.training.summary import Cost
from tests.support.runs import distill, resolve


@pytest.fixture(autouse=True)
def _fixed_costs() -> None:
    """Costs are measured."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_estimated_time_is_that_of_a_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in seconds of the processor, however busy the machine is."""
    began: list[tuple[Cost, float]] = []
    monkeypatch.setattr(cost_time, "clock", time.process_time)
    log_summary = trainer.log_summary

    def start(config: Any, teacher: Any, cost: Cost, plan: Any, **more: Any) -> None:
        log_summary(config, teacher, cost, plan, **more)
        began.append((cost, time.process_time()))

    monkeypatch.setattr(trainer, "log_summary", start)
    own = {"teacher.model": "tiny", "student.kind": kind, "optim.max_train_steps": 30, "optim.batch_size": 8}
    own |= {"data.max_samples": 128, "run.validate_every": 15, "run.output": str(tmp_path / "run")}
    distill(resolve({}, {**own, "data.cache_dir": str(tmp_path / "cache")}))
    ((cost, start_time),) = began
    assert cost.seconds == pytest.approx(time.process_time() - start_time, rel=0.25)
