"""Points of an evaluation without their numbers or images: left out, reported, and nothing else is moved to their place."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lcmdistill.evaluation.previews import damaged_previews, write_previews
from lcmdistill.evaluation.results import read_results
from lcmdistill.report.page import preview
from lcmdistill.report.pictures import validation_grids
from tests.support.evaluated import results_of

POINTS = ("student-01-g4", "student-02-g4")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an evaluation of two points and three prompts."""
    folder = tmp_path / "evaluation"
    for name in POINTS:
        (folder / "points" / name).mkdir(parents=True)
        images = {i: Image.new("RGB", (16, 16), (80 * i, 0, 0)) for i in range(3)}
        previews = write_previews(images, folder / "points" / name)
        numbers = {"numbers": {"ssim": 0.5}, "seconds_per_image": 1.0, "previews": previews}
        (folder / "points" / name / "numbers.json").write_text(json.dumps(numbers))
    sweep = {
        "points": POINTS,
        "steps": [1, 2],
        "guidance_scales": [4.0],
        "preview_prompts": ["a cat", "a dog", "a cow"],
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    (folder / "consistency.json").write_text(json.dumps({"points": []}))
    return tmp_path


def test_a_missing_image_does_not_shift_the_others(run: Path) -> None:
    folder = run / "evaluation" / "points" / POINTS[0]
    (folder / "00.webp").unlink()
    assert damaged_previews(folder) == {"00.webp": "missing"}  # which the next evaluation makes again
    results = results_of(run)
    assert results.previews("student", 1, 4.0) == [None, folder / "01.webp", folder / "02.webp"]
    assert preview(results, "student", 1, 4.0, 0, "student") is None
    shown = preview(results, "student", 1, 4.0, 1, "student")
    assert shown is not None
    assert shown.alt.startswith("a dog")
    assert results.previews("student", 7, 4.0) == []


def test_a_changed_image_is_noticed_unless_an_earlier_version_wrote_it(run: Path) -> None:
    folder = run / "evaluation" / "points" / POINTS[0]
    Image.new("RGB", (16, 16), "blue").save(folder / "01.webp")
    assert damaged_previews(folder) == {"01.webp": "damaged"}
    assert results_of(run).previews("student", 1, 4.0)[1] is None
    numbers = json.loads((folder / "numbers.json").read_text())
    del numbers["previews"]
    (folder / "numbers.json").write_text(json.dumps(numbers))
    assert results_of(run).previews("student", 1, 4.0)[1] == folder / "01.webp"


@pytest.mark.parametrize("name", ["points/student-02-g4/numbers.json", "consistency.json", "sweep.json"])
def test_a_part_that_is_missing_is_reported(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(results_of(run).points) == sorted(POINTS)
    assert caplog.text == ""
    (run / "evaluation" / name).unlink()
    results = read_results(run)
    assert (results is None) == (name == "sweep.json")
    if results is not None:
        assert len(results.points) == (1 if "points" in name else 2)
    assert caplog.text.count("left out") == 1
    assert f"evaluate again: lcmdistill evaluate {run}" in caplog.text


def test_a_validation_grid_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "step-000002.png")
    (picture,) = validation_grids(tmp_path, [2])
    assert (picture.name, caplog.text) == ("2", "")
    assert len(validation_grids(tmp_path, [2, 4, 6])) == 1
    assert f"{tmp_path} lacks 2 validation grids, such as step-000004.png" in caplog.text
