"""The report: a self-contained page that describes its numbers and is accessible."""

import itertools
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.evaluation.results import read_results
from lcmdistill.evaluation.sweep import recorded_key
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.hub.model_card import update_run_card
from lcmdistill.report.card import write_card_plots
from lcmdistill.report.comparison import write_comparison
from lcmdistill.report.guidance import guidance_note
from lcmdistill.report.page import evaluation_summary, write_report
from lcmdistill.utils.errors import UsageError
from tests.support.teachers import Command

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """A page's tags and text. Tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def check_page(path: Path) -> Page:
    """Check that a page makes no requests and is accessible to screen readers."""
    page, source = Page(path), path.read_text(encoding="utf-8")
    addresses = [tag.get(key) for _, tag in page.tags for key in ("src", "href", "data", "action") if key in tag]
    assert addresses
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|<iframe|<script src", source)
    assert all((image.get("alt") or "").strip() for image in page.all("img"))
    assert all(image.get("width") and image.get("height") for image in page.all("img"))
    ids = [tag["id"] for _, tag in page.tags if tag.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.all("a") if "download" not in link} <= {f"#{name}" for name in ids}
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    names = Counter(tag for tag, _ in page.tags)
    assert names["table"] == names["caption"]
    labels = {label["for"] for label in page.all("label")}
    assert all(control.get("id") in labels for control in page.all("input", "select"))
    charts = [tag for tag in page.all("svg") if tag.get("role") == "img"]
    assert all(set((chart["aria-labelledby"] or "").split()) <= set(ids) for chart in charts)
    (html,) = page.all("html")
    assert html["lang"] == "en"
    return page


def test_the_page_of_an_evaluated_run_shows_everything(evaluated_run: Path):
    page = check_page(write_report(evaluated_run))
    for heading in (
        "Steps and guidance",
        "Quality by steps",
        "Time per image",
        "Training",
        "Validation during training",
        "Usage",
        "Configuration",
    ):
        assert page.text.count(heading) >= 2, "in the navigation and as a heading"
    for name in (
        "diffusers",
        "ComfyUI",
        "A1111",
        "Loss by noise level",
        "Latent RMSE",
        "SSIM",
        "Sharpness",
        "KID (small)",
    ):
        assert name in page.text
    assert "not comparable" in page.text
    assert "3 images per row of 3 captions of the run's own data, which training saw, from" in page.text
    assert evaluation_summary(evaluated_run).splitlines()[0].split(": ", 1)[1] in page.text
    alts = [image["alt"] or "" for image in page.all("img")]
    assert sum("student, 2 steps, guidance 4" in alt for alt in alts) >= 3
    assert sum("teacher, 50 steps, guidance 2" in alt for alt in alts) == 3
    assert len([alt for alt in alts if alt.startswith("Validation images after")]) == 2
    zooms = [button for button in page.all("button") if button.get("class") == "zoom"]
    places = [tuple(button[f"data-{name}"] for name in ("set", "prompt", "row", "column")) for button in zooms]
    assert len(set(places)) == len(places) > 20
    results = read_results(evaluated_run)
    assert results is not None
    reasons = verdict(results).reasons
    # Two facts, the pictures, and then the other reasons.
    order = [page.text.index(text) for text in (reasons[0], results.info["preview_prompts"][0], *reasons[1:])]
    assert order == sorted(order)
    (slider,) = page.all("input")
    assert (slider["type"], slider["max"]) == ("range", "1")


def test_a_run_without_an_evaluation_has_a_page(small_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    page = check_page(write_report(run))
    assert "Not evaluated yet." in page.text
    assert "lcmdistill evaluate run" in page.text
    assert "Loss by noise level" in page.text
    assert "Steps and guidance" not in page.text
    with pytest.raises(UsageError, match="has not been evaluated; run: lcmdistill evaluate"):
        evaluation_summary(run)


def changed_sweep(run: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = run / "evaluation" / "sweep.json"
    info = {key: value for key, value in json.loads(path.read_text()).items() if key not in (*drop, "checksum")}
    path.write_text(json.dumps({**info, **values}))


def test_an_evaluation_by_an_earlier_version_is_left_aside(
    evaluated_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """It named its points otherwise. A run that is trained further must not end because of it."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    changed_sweep(run, drop=("points",), cells=[])
    assert read_results(run) is None
    assert "is by an earlier version; evaluate again: lcmdistill evaluate" in caplog.text
    check_page(write_report(run))


@pytest.mark.parametrize(
    ("has_classes", "text"),
    [(True, "3 images per row of 3 classes, from"), (False, "3 images per row, from")],
)
def test_images_without_prompts_are_not_called_held_out(
    evaluated_run: Path, tmp_path: Path, has_classes: bool, text: str
):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    changed_sweep(run, held_out=False, prompts_origin="", has_classes=has_classes, is_baked=True)
    page = check_page(write_report(run))
    assert text in page.text
    assert "held out" not in page.text
    assert "guidance is in" not in page.text


def test_guidance_with_little_effect_is_reported(evaluated_run: Path, tmp_path: Path):
    from PIL import Image

    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    shades = {"student-02-g2": 100, "student-02-g4": 104, "teacher-50-g2": 100, "teacher-50-g4": 140}
    shades |= {"student-01-g2": 100, "student-01-g4": 104}  # the page looks at one of them

    def note(**others: int) -> str | None:
        for name, shade in {**shades, **others}.items():
            folder = run / "evaluation" / "points" / name
            numbers = json.loads((folder / "numbers.json").read_text())
            (folder / "numbers.json").write_text(json.dumps(numbers | {"previews": {}, "checksum": None}))
            for path in folder.glob("*.webp"):
                Image.new("RGB", (16, 16), (shade,) * 3).save(path, lossless=True)
        results = read_results(run)
        assert results is not None
        return guidance_note(results, 2)

    text = note()
    assert text is not None
    assert text.startswith(
        "Between guidance 2 and 4, the student's images change by 1.6% of the pixel range and the teacher's by 15.7%"
    )
    assert text in check_page(write_report(run)).text.replace("\n", " ")
    assert note(**{"student-02-g4": 120}) is None
    few = note(**{"teacher-50-g4": 101})
    assert few is not None
    assert "the teacher's images differ by only 0.4%" in few


def test_an_outdated_evaluation_is_reported(evaluated_run: Path, tmp_path: Path):
    run = tmp_path / "my run"
    shutil.copytree(evaluated_run, run)
    assert update_run_card(run)
    card = (run / "README.md").read_text()
    warning = "This evaluation is of training step 4, and the run has continued to step 9"
    assert warning not in Page(write_report(run)).text
    config = (run / "config.toml").read_text().replace("max_train_steps = 4", "max_train_steps = 9")
    (run / "config.toml").write_text(config + "# checksum: any\n")
    page = check_page(write_report(run))
    assert warning in page.text
    assert "lcmdistill evaluate 'my run'" in page.text
    assert not update_run_card(run)
    assert (run / "README.md").read_text() == card


def test_unreadable_parts_are_skipped_and_reported(
    evaluated_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """An fp16 run logs infinite gradient norms; an interrupted run may leave half a line and half an image."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    pictures = sorted((run / "samples").glob("step-*.png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:200])
    shutil.copy(pictures[1], run / "samples" / "step-mine.png")
    previews = sorted((run / "evaluation" / "points").rglob("*.webp"))
    flipped = bytearray(previews[3].read_bytes())
    flipped[len(flipped) // 2] ^= 1  # which decodes to another image
    damages = (b"", b"%!PS-Adobe-3.0", previews[2].read_bytes()[:99], bytes(flipped))
    for path, damaged in zip(previews, damages, strict=False):
        path.write_bytes(damaged)
    previews[4].unlink()
    line = {"step": 5, "loss": 0.5, "grad_norm": float("inf"), "learning_rate": 1e-3, "samples_per_s": 1.0}
    line |= {"loss_by_noise": [float("nan")] + 9 * [None]}
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(line) + '\n[1]\n{"loss": 1.0}\n{"step": 6, "lo')
    page = check_page(write_report(run))
    assert len([image for image in page.all("img") if (image["alt"] or "").startswith("Validation")]) == 1
    assert f"{pictures[0]} is left out of the report: corrupt image" in caplog.text
    for path, state in zip(previews, [*4 * ["damaged"], "missing"], strict=False):
        sentence = f"{path} is {state}, and is left out; evaluate again: lcmdistill evaluate {run}"
        assert caplog.text.count(sentence) == 1
    assert "inf" not in re.findall(r"Gradient norm</title><desc[^>]*>([^<]*)", (run / "report.html").read_text())[0]
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "Gradient norm" not in check_page(write_report(run)).text
    (run / "evaluation" / "sweep.json").write_text('{"ce')
    with pytest.raises(UsageError, match=r"cannot be read .*; evaluate again: lcmdistill evaluate"):
        write_report(run)


def test_times_say_how_they_were_taken(evaluated_run: Path, tmp_path: Path):
    """Times of an earlier sweep are those of its batches, not of the current ones."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    assert "without decoding, in batches of 3 on cpu, " in Page(write_report(run)).text
    path = run / "evaluation" / "points" / "student-01-g4" / "numbers.json"
    point = json.loads(path.read_text())
    path.write_text(json.dumps(point | {"conditions": "batches of 1 on cuda"}))
    assert recorded_key(path) is None, "it is measured again"
    with pytest.raises(
        UsageError, match=r"numbers.json was changed or damaged after .* evaluate again: lcmdistill evaluate"
    ):
        write_report(run)
    path.write_text(json.dumps(point | {"conditions": "batches of 1 on cuda", "checksum": None}))
    text = Page(write_report(run)).text
    assert "without decoding, under different conditions" in text
    assert "student, 1 step, in batches of 1 on cuda" in text


def test_a_page_is_deterministic(evaluated_run: Path):
    first = write_report(evaluated_run).read_bytes()
    assert write_report(evaluated_run).read_bytes() == first


def test_user_text_is_escaped(evaluated_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    path = run / "evaluation" / "sweep.json"
    about = json.loads(path.read_text())
    del about["checksum"]
    about["preview_prompts"][0] = '"><script>alert(1)</script>'
    path.write_text(json.dumps(about))
    page = check_page(write_report(run))
    assert page.text.count("<script>alert(1)</script>") >= 2
    assert len(page.all("script")) == 1


def test_several_runs_are_compared_on_one_page(evaluated_run: Path, tmp_path: Path):
    other = tmp_path / "other-lcm"
    shutil.copytree(evaluated_run, other)
    page = check_page(write_comparison([evaluated_run, other], tmp_path / "comparison.html"))
    assert "small-lcm and other-lcm" in page.text
    assert "is the best of 2 by KID to the teacher (small) at 2 steps" in page.text
    assert "lcmdistill sample" in page.text
    assert sum("other-lcm, 2 steps" in (image["alt"] or "") for image in page.all("img")) == 3
    path = other / "evaluation" / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1, "checksum": None}))
    with pytest.raises(UsageError, match="evaluated with different seed"):
        write_comparison([evaluated_run, other], tmp_path / "comparison.html")


def test_the_command_line_evaluates_and_reports(
    command: Command, small_run: Path, small_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcmdistill.report.page.to_svg", lambda chart, number: "<svg></svg>")
    for name in ("one", "two"):
        shutil.copytree(small_run, tmp_path / name)
    monkeypatch.setattr("lcmdistill.evaluation.metrics.features.MIN_KID_IMAGES", 2)
    few = ["--steps", "1", "--steps", 2, "--num-images", 2, "--features", small_features, "--device", "cpu"]
    code, out, err = command("evaluate", "one", "two", *few)
    assert (code, err.count("Error")) == (0, 0)
    assert re.search(r"generating 2 images: student, 2 steps, guidance scale 4  left \d", out)
    assert "report: one/report.html" in out
    assert "by KID to the teacher (small) at 2 steps:\n  1. one: " in out
    assert "comparison: comparison.html" in out
    check_page(tmp_path / "comparison.html")
    (tmp_path / "one" / "report.html").unlink()
    assert command("report", "one")[:2] == (0, "report: one/report.html, and the plots in one/README.md\n")
    assert (tmp_path / "one" / "report.html").is_file()


def test_the_output_of_a_comparison_is_checked_first(command: Command, small_run: Path, tmp_path: Path):
    for name in ("one", "two"):
        shutil.copytree(small_run, tmp_path / name)
    (tmp_path / "file").write_text("")
    for more, message in (
        (["one", "two", "--output", "two"], "--output two is a folder; specify a file, such as two/comparison.html"),
        (["one", "two", "--output", "file/c.html"], "--output file/c.html cannot be created"),
        (["one", "--output", "c.html"], "--output is for several runs; the page of one is one/report.html"),
        (["one", "./one"], "a run is listed twice"),
    ):
        code, out, err = command("evaluate", *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_a_run_given_as_a_dot_keeps_its_name(
    command: Command, evaluated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    monkeypatch.chdir(run)
    assert command("report", ".")[0] == 0
    assert "<h1>run</h1>" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (
            ["evaluate", "nowhere", "--steps", "a"],
            "--steps is 'a'; it must be comma-separated numbers, such as 1,2,4,8",
        ),
        (["evaluate", "nowhere", "--steps", "0,1"], "--steps is '0,1'; each number must be from 1 to 1000"),
        (["evaluate", "nowhere", "--guidance-scale", ""], "--guidance-scale is ''; each number must be from 1 to 1000"),
        (["evaluate", "nowhere", "--guidance-scale", "nan"], "each number must be from 1 to 1000"),
    ],
)
def test_wrong_usage_ends_in_one_sentence(command: Command, arguments: list[str], message: str):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_the_model_card_shows_the_results_with_plots(evaluated_run: Path, small_run: Path, tmp_path: Path):
    from PIL import Image

    run = tmp_path / evaluated_run.name
    shutil.copytree(evaluated_run, run)
    plain = (run / "README.md").read_text()
    write_card_plots(run)
    assert update_run_card(run)
    card = (run / "README.md").read_text()
    assert re.sub(r"\n## Measured\n.*?(?=\n## Use\n)", "", card, flags=re.DOTALL) == plain
    assert evaluation_summary(run).splitlines()[0].split(": ", 1)[1] in card
    for name in ("quality", "training"):
        assert f"(samples/{name}.png)" in card
        with Image.open(run / "samples" / f"{name}.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    before = (run / "samples" / "quality.png").read_bytes()
    write_card_plots(run)
    assert update_run_card(run)
    assert ((run / "README.md").read_text(), (run / "samples" / "quality.png").read_bytes()) == (card, before)
    assert not update_run_card(small_run)
