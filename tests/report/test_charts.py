"""The charts of the report: SVG and PNG from one renderer."""

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest.mock import ANY
from xml.etree import ElementTree

import pytest

from lcmdistill.report.charts import COLORS, RAW, Chart, Series, describe_chart, short, to_svg, write_png
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


KID = Chart(
    "KID <1>",
    "steps",
    "KID",
    (
        Series("student", ((1, 0.4), (2, 0.2), (8, 0.0))),
        Series("teacher & co", ((1, 0.9), (2, 0.5), (8, 0.3)), 1),
        Series("raw", ((1, 0.5), (8, 0.5)), RAW),
    ),
    (("full", 0.1),),
    log2_x=True,
)


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_a_chart_places_and_states_its_points() -> None:
    svg = to_svg(replace(KID, series=KID.series[:1]), 3)
    (x1, y1), (x2, y2), (x8, y8) = circles(svg)
    assert (x8 - x2) / (x2 - x1) == pytest.approx(2, rel=1e-2)  # twice as many doublings
    assert y1 < y2 < y8
    assert y8 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert "<title>student, 2: 0.2</title>" in svg
    assert "<title>full: 0.1</title>" in svg
    assert "student: 0.4 at 1, 0.2 at 2, 0 at 8; full: 0.1" in describe_chart(replace(KID, series=KID.series[:1]))


def test_a_chart_is_an_image_with_a_title_and_a_description() -> None:
    root = ElementTree.fromstring(to_svg(KID, 3))
    assert root.attrib == {"viewBox": ANY, "class": "chart", "role": "img", "aria-labelledby": "c3t c3d"}
    title, description = root[0], root[1]
    assert (title.tag, title.get("id"), title.text) == ("title", "c3t", "KID <1>")
    assert (description.tag, description.get("id"), description.text) == ("desc", "c3d", describe_chart(KID))
    texts = [element.text for element in root.iter("text")]
    assert texts[:4] == ["1", "2", "8", "steps"]
    assert "0.2" in texts
    assert len(circles(to_svg(KID, 0))) == 8


def test_a_chart_takes_its_colors_from_the_page_and_refers_to_nothing() -> None:
    svg = to_svg(KID, 0)
    assert not re.search(r"#[0-9a-f]{6}|rgb\(|url\(|href|font-family", svg)
    css = (files("lcmdistill") / "assets" / "report" / "page.css").read_text()
    light = css.split("@media")[0]
    for name in {*re.findall(r"var\(--([\w-]+)\)", svg)}:
        assert css.count(f"--{name}:") == 2, "a color for light and one for dark"
    for name in ("l0", "l1", "l2", "soft", "grid"):
        assert f"--{name}: {COLORS[name]};" in light


def test_charts_are_deterministic(tmp_path: Path) -> None:
    assert to_svg(KID, 0) == to_svg(KID, 0)
    assert "metadata" not in to_svg(KID, 0)
    first, second = (write_png([KID, KID], tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert first == second


def test_a_chart_of_one_point_is_a_dot() -> None:
    assert len(circles(to_svg(Chart("a", "x", "y", (Series("s", ((5, 1.0),)),), markers=False), 0))) == 1


def test_the_loss_by_noise_level_has_thirds_of_the_training():
    lines = [{"step": i, "loss": 1.0, "loss_by_noise": [float(i), None]} for i in range(1, 7)]
    chart = loss_by_noise(lines)
    assert {series.name: series.points for series in chart.series} == {
        "first third": ((0.25, 1.5),),
        "middle third": ((0.25, 3.5),),
        "last third": ((0.25, 5.5),),
    }
    assert training_charts([]) == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_usage_names_existing_files(kind: str):
    flags = {"student.kind": kind, "teacher.model": "sd15", "run.validation_guidance_scale": 7.5}
    config = resolve({}, flags)
    cards = {use["name"]: use for use in uses(Path("runs/x"), config, 2)}
    assert list(cards) == ["diffusers", "ComfyUI", "A1111", "Command line"]
    assert "num_inference_steps=2" in cards["diffusers"]["code"]
    compile(cards["diffusers"]["code"], "card", "exec")
    file = "Copy x.safetensors to models/loras" if kind == "lora" else "lcmdistill export runs/x --format single-file"
    assert file in " ".join([*cards["ComfyUI"]["lines"], cards["ComfyUI"]["code"] or ""])
