"""The report: one file that asks for nothing, says what the numbers mean, and can be read by everybody."""

import re
from pathlib import Path

import pytest

from lcmdistill.report.charts import Chart, Series, described, short, to_svg
from lcmdistill.report.curves import loss_by_noise, training_charts
from lcmdistill.report.uses import uses
from tests.support.runs import resolve


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.05, "0.05"),
        (400, "400"),
        (9999.4, "9999"),
        (12500.0, "12500"),
        (2e5, "2e5"),
        (1e-4, "1e-4"),
        (-20000.0, "-20000"),
    ],
)
def test_numbers_of_a_chart_are_short(value: float, text: str):
    assert short(value) == text


def test_a_chart_draws_its_points_where_they_are_and_says_them():
    chart = Chart(
        "KID", "steps", "KID", (Series("student", ((1, 0.4), (2, 0.2), (8, 0.0))),), (("teacher", 0.1),), doubling=True
    )
    svg = to_svg(chart, 3)
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x1, y1), (x2, y2), (x8, y8) = dots
    assert (x8 - x2) / (x2 - x1) == pytest.approx(2, rel=1e-2)  # twice as many doublings
    assert y1 < y2 < y8
    assert y8 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert "student: 0.4 at 1, 0.2 at 2, 0 at 8; teacher: 0.1" in described(chart)
    assert 'aria-labelledby="c3t c3d"' in svg


def test_a_chart_of_one_point_is_a_dot():
    assert to_svg(Chart("a", "x", "y", (Series("s", ((5, 1.0),)),)), 0).count("<circle") == 1


def test_the_loss_by_noise_is_told_by_thirds_of_the_training():
    lines = [{"step": i, "loss": 1.0, "loss_by_noise": [float(i), None]} for i in range(1, 7)]
    chart = loss_by_noise(lines)
    assert {series.name: series.points for series in chart.series} == {
        "first third": ((0.25, 1.5),),
        "second third": ((0.25, 3.5),),
        "last third": ((0.25, 5.5),),
    }
    assert training_charts([]) == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_how_to_use_it_names_the_files_that_are_there(kind: str):
    flags = {"student.kind": kind, "teacher.model": "sd15", "run.validation_guidance_scale": 7.5}
    config = resolve({}, flags)
    cards = {use["name"]: use for use in uses(Path("runs/x"), config, 2)}
    assert list(cards) == ["diffusers", "ComfyUI", "A1111", "Command line"]
    assert "num_inference_steps=2" in cards["diffusers"]["code"]
    compile(cards["diffusers"]["code"], "card", "exec")
    file = "lora/x.safetensors" if kind == "lora" else "lcmdistill export runs/x --format single-file"
    assert file in " ".join([*cards["ComfyUI"]["lines"], cards["ComfyUI"]["code"] or ""])
