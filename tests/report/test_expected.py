"""The loss of our own runs is drawn behind that of a run with the same settings, and of no other."""

from typing import Any

import pytest

from lcmdistill.report.curves import training_charts
from lcmdistill.report.expected import expected_loss
from tests.support.runs import resolve


def config(**values: Any) -> Any:
    settings = {"teacher.model": "tiny", **{key.replace("__", "."): value for key, value in values.items()}}
    return resolve({}, settings)


@pytest.mark.parametrize("objective", ["lcm", "tdm"])
def test_a_default_run_of_the_bundled_teacher_has_an_expected_loss(objective: str):
    """A setting whose default changes needs another recording: examples/tiny_teacher/loss_curves.py."""
    curve = expected_loss(config(objective__name=objective))
    assert len(curve) > 30
    assert curve[0][1] > curve[-1][1] > 0
    assert expected_loss(config(objective__name=objective, run__seed=5, optim__max_train_steps=50)) == curve


@pytest.mark.parametrize(
    "values",
    [
        {"optim__learning_rate": 1e-3},
        {"objective__skip": 5},
        {"optim__batch_size": 8},
        {"data__sources": ("teacher",)},
        {"student__kind": "lora"},
        {"optim__lr_scheduler": "cosine"},
    ],
)
def test_another_setting_has_none(values: dict[str, Any]):
    assert expected_loss(config(**values)) == ()


def test_the_expected_loss_is_drawn_up_to_the_runs_last_step():
    lines = [
        {"step": n, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "samples_per_s": 1.0} for n in (10, 20, 30)
    ]
    chart = training_charts(lines, [(10.0, 0.5), (30.0, 0.4), (400.0, 0.1)])[0]
    assert (chart.series[-1].name, chart.series[-1].points) == ("expected", ((10.0, 0.5), (30.0, 0.4)))
    assert "Dotted: a run of ours with the same settings" in chart.about
    assert len(training_charts(lines)[0].series) == 1
