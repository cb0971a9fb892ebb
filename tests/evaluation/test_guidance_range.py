"""Guidance scales that a student was never trained with."""

from pathlib import Path

import pytest

from lcmdistill.config.guidance import OmegaRange
from lcmdistill.config.schema import RunConfig
from lcmdistill.evaluation import evaluate
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions
from lcmdistill.sampling.generate import ModelToSample


def test_a_scale_outside_the_trained_range_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(EvaluatedRun, "is_baked", False)
    run = EvaluatedRun(Path("out"), RunConfig(), ModelToSample("out/pipeline", omegas=OmegaRange(1.0, 5.0)))
    scales = (4.0, 50.0)
    assert evaluate._guidance_scales(run, [run], EvaluationOptions(guidance_scales=scales)) == scales
    assert [record.message.startswith("out: guidance scale 50 is outside") for record in caplog.records] == [True]
