"""The report: one file that asks for nothing, says what the numbers mean, and can be read by everybody."""

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
from lcmdistill.report.card import add_to_card
from lcmdistill.report.comparison import write_comparison
from lcmdistill.report.guidance import guidance_note
from lcmdistill.report.page import evaluation_summary, write_report
from lcmdistill.utils.errors import UsageError
from tests.support.teachers import Command

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """A page's tags, checked to be closed in their order, and what they hold."""

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
    """What holds of every page: nothing from outside, and nothing that a screen reader cannot tell."""
    page, source = Page(path), path.read_text(encoding="utf-8")
    addresses = [tag.get(key) for _, tag in page.tags for key in ("src", "href", "data", "action") if key in tag]
    assert addresses
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|<iframe|<script src", source)
    assert all((image.get("alt") or "").strip() for image in page.all("img"))
    assert all(image.get("width") and image.get("height") for image in page.all("img"))
    ids = [tag["id"] for _, tag in page.tags if tag.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
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
        "How good, step by step",
        "Time per image",
        "Training",
        "Validation over time",
    ):
        assert heading in page.text
    for name in ("diffusers", "ComfyUI", "A1111", "Loss by noise", "Latent RMSE", "SSIM", "Sharpness", "KID (small)"):
        assert name in page.text
    assert "no published figure" in page.text
    assert "held out of training" in page.text
    assert evaluation_summary(evaluated_run).splitlines()[0].split(": ", 1)[1] in page.text
    pictures = [image["alt"] or "" for image in page.all("img")]
    assert sum("student, 2 steps, guidance 4" in alt for alt in pictures) >= 3
    assert sum("teacher, 50 steps, guidance 2" in alt for alt in pictures) == 3
    assert len([alt for alt in pictures if alt.startswith("Validation pictures after")]) == 2
    (slider,) = page.all("input")
    assert (slider["type"], slider["max"]) == ("range", "1")


def test_a_run_that_was_not_evaluated_has_a_page_too(small_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    page = check_page(write_report(run))
    assert "Not measured yet." in page.text
    assert f"lcmdistill evaluate {run}" in page.text
    assert "Loss by noise" in page.text
    assert "Steps and guidance" not in page.text
    with pytest.raises(UsageError, match="has not been evaluated; run: lcmdistill evaluate"):
        evaluation_summary(run)


def changed_sweep(run: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = run / "evaluation" / "sweep.json"
    about = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**about, **values}))


def test_an_evaluation_of_an_earlier_version_is_read(evaluated_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    changed_sweep(run, drop=("held_out", "has_classes", "is_baked"), is_lora=True)
    page = check_page(write_report(run))
    assert "prompts that were held out of training" in page.text
    assert "Its guidance is in its weights" in page.text
    assert evaluation_summary(run) == evaluation_summary(evaluated_run).replace("small-lcm", "run")
    assert add_to_card(run)
    check_page(write_comparison([run, evaluated_run], tmp_path / "comparison.html"))


@pytest.mark.parametrize(
    ("has_classes", "said"),
    [(True, "3 images in each cell, of 3 classes, all"), (False, "3 images in each cell, all from")],
)
def test_pictures_of_no_prompts_are_not_called_held_out(
    evaluated_run: Path, tmp_path: Path, has_classes: bool, said: str
):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    changed_sweep(run, held_out=False, has_classes=has_classes, is_baked=True)
    page = check_page(write_report(run))
    assert said in page.text
    assert "held out" not in page.text
    assert "guidance is in" not in page.text


def test_guidance_that_does_little_is_said(evaluated_run: Path, tmp_path: Path):
    from PIL import Image

    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    shades = {"student-02-g2": 100, "student-02-g4": 104, "teacher-50-g2": 100, "teacher-50-g4": 140}
    shades |= {"student-01-g2": 100, "student-01-g4": 104}  # one of which the page looks at

    def note(**others: int) -> str | None:
        for name, shade in {**shades, **others}.items():
            for path in (run / "evaluation" / "cells" / name).glob("*.webp"):
                Image.new("RGB", (16, 16), (shade,) * 3).save(path, lossless=True)
        results = read_results(run)
        assert results is not None
        return guidance_note(results, 2)

    said = note()
    assert said is not None
    assert said.startswith(
        "Between guidance 2 and 4 the student's pictures change by 1.6% of a pixel's range where the teacher's"
    )
    assert "by 15.7%" in said
    assert said in check_page(write_report(run)).text.replace("\n", " ")
    assert note(**{"student-02-g4": 120}) is None
    few = note(**{"teacher-50-g4": 101})
    assert few is not None
    assert "the teacher's own pictures hardly differ, by 0.4%" in few


def test_a_run_that_went_on_is_not_told_by_its_old_numbers_alone(evaluated_run: Path, tmp_path: Path):
    run = tmp_path / "my run"
    shutil.copytree(evaluated_run, run)
    assert add_to_card(run)
    card, said = (run / "README.md").read_text(), "was drawn after 4 training steps, and the run was taken to 9 since"
    assert said not in Page(write_report(run)).text
    config = (run / "config.toml").read_text().replace("max_train_steps = 4", "max_train_steps = 9")
    (run / "config.toml").write_text(config)
    page = check_page(write_report(run))
    assert said in page.text
    assert f"lcmdistill evaluate '{run}'" in page.text
    assert not add_to_card(run)
    assert (run / "README.md").read_text() == card


def test_a_page_is_made_of_what_can_be_read(evaluated_run: Path, tmp_path: Path):
    """A run under fp16 logs infinite gradient norms; one that was cut off may leave half a line, and half a picture."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    pictures = sorted((run / "samples").glob("step-*.png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:200])
    shutil.copy(pictures[1], run / "samples" / "step-mine.png")
    line = {"step": 5, "loss": 0.5, "grad_norm": float("inf"), "learning_rate": 1e-3, "samples_per_s": 1.0}
    line |= {"loss_by_noise": [float("nan")] + 9 * [None]}
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(line) + '\n[1]\n{"loss": 1.0}\n{"step": 6, "lo')
    page = check_page(write_report(run))
    assert len([image for image in page.all("img") if (image["alt"] or "").startswith("Validation")]) == 1
    assert "inf" not in re.findall(r"Gradient norm</title><desc[^>]*>([^<]*)", (run / "report.html").read_text())[0]
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "Gradient norm" not in check_page(write_report(run)).text
    (run / "evaluation" / "sweep.json").write_text('{"ce')
    with pytest.raises(UsageError, match=r"cannot be read .*; make it anew: lcmdistill evaluate"):
        write_report(run)


def test_times_say_how_they_were_taken(evaluated_run: Path, tmp_path: Path):
    """What was kept from an earlier sweep was drawn in its batches, not in those of this one."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    assert "without decoding, in batches of 3 on cpu, " in Page(write_report(run)).text
    path = run / "evaluation" / "cells" / "student-01-g4" / "numbers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "how": "batches of 1 on cuda"}))
    text = Page(write_report(run)).text
    assert "without decoding, not all in the same way" in text
    assert "student, 1 step, in batches of 1 on cuda" in text


def test_a_page_is_the_same_when_it_is_made_again(evaluated_run: Path):
    first = write_report(evaluated_run).read_bytes()
    assert write_report(evaluated_run).read_bytes() == first


def test_what_a_user_writes_is_text_on_the_page_and_nothing_else(evaluated_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    path = run / "evaluation" / "sweep.json"
    about = json.loads(path.read_text())
    about["pictured_prompts"][0] = '"><script>alert(1)</script>'
    path.write_text(json.dumps(about))
    page = check_page(write_report(run))
    assert page.text.count("<script>alert(1)</script>") >= 2
    assert len(page.all("script")) == 1


def test_runs_are_compared_on_one_page(evaluated_run: Path, tmp_path: Path):
    other = tmp_path / "other-lcm"
    shutil.copytree(evaluated_run, other)
    page = check_page(write_comparison([evaluated_run, other], tmp_path / "comparison.html"))
    assert "small-lcm and other-lcm" in page.text
    assert sum("other-lcm, 2 steps" in (image["alt"] or "") for image in page.all("img")) == 3
    path = other / "evaluation" / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))
    with pytest.raises(UsageError, match="evaluated with other seed"):
        write_comparison([evaluated_run, other], tmp_path / "comparison.html")


def test_the_command_line_evaluates_and_reports(
    command: Command, small_run: Path, small_features: Path, tmp_path: Path
):
    for name in ("one", "two"):
        shutil.copytree(small_run, tmp_path / name)
    few = ["--steps", "1", "--steps", 2, "--num-images", 2, "--features", small_features, "--device", "cpu"]
    code, out, err = command("evaluate", "one", "two", *few)
    assert (code, err.count("Error")) == (0, 0)
    assert "student-02-g4" in out
    assert "look at one/report.html" in out
    assert "side by side: comparison.html" in out
    check_page(tmp_path / "comparison.html")
    (tmp_path / "one" / "report.html").unlink()
    assert command("report", "one")[:2] == (0, "look at one/report.html, and the plots in one/README.md\n")
    assert (tmp_path / "one" / "report.html").is_file()


def test_where_a_comparison_goes_is_known_before_anything_is_drawn(command: Command, small_run: Path, tmp_path: Path):
    for name in ("one", "two"):
        shutil.copytree(small_run, tmp_path / name)
    (tmp_path / "file").write_text("")
    for more, message in (
        (["one", "two", "--output", "two"], "--output two is a folder; name a file, such as two/comparison.html"),
        (["one", "two", "--output", "file/c.html"], "--output file/c.html cannot be created"),
        (["one", "--output", "c.html"], "--output is for several runs; the page of one is one/report.html"),
        (["one", "./one"], "a run is named twice"),
    ):
        code, out, err = command("evaluate", *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_a_run_that_is_named_by_a_dot_keeps_its_name(
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
        (["evaluate", "nowhere", "--steps", "a"], "--steps is 'a'; it must be numbers with commas, such as 1,2,4,8"),
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


def test_the_model_card_tells_what_was_measured_with_plots(evaluated_run: Path, small_run: Path, tmp_path: Path):
    from PIL import Image

    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    plain = (run / "README.md").read_text()
    assert add_to_card(run)
    card = (run / "README.md").read_text()
    assert re.sub(r"\n## Measured\n.*?(?=\n## Use\n)", "", card, flags=re.DOTALL) == plain
    assert evaluation_summary(run).splitlines()[0].split(": ", 1)[1] in card
    for name in ("quality", "training"):
        assert f"(samples/{name}.png)" in card
        with Image.open(run / "samples" / f"{name}.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    before = (run / "samples" / "quality.png").read_bytes()
    assert add_to_card(run)
    assert ((run / "README.md").read_text(), (run / "samples" / "quality.png").read_bytes()) == (card, before)
    assert not add_to_card(small_run)
