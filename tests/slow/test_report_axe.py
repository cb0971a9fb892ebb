"""The pages in Chromium with keyboard and axe-core, at two widths, light and dark.

It needs Chromium, `pip install playwright`, and axe-core: `npm install axe-core` in the repository, or LCMDISTILL_AXE=FILE.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.report.comparison import write_comparison
from lcmdistill.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

AXE = Path(os.environ.get("LCMDISTILL_AXE", "node_modules/axe-core/axe.min.js"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["report", "comparison"])
def page_file(request: pytest.FixtureRequest, evaluated_run: Path, tmp_path: Path) -> Path:
    if request.param == "report":
        return write_report(evaluated_run)
    shutil.copytree(evaluated_run, tmp_path / "other")
    return write_comparison([evaluated_run, tmp_path / "other"], tmp_path / "comparison.html")


def faults(page: Any) -> list[str]:
    """Return what axe-core finds, with the first element of each fault."""
    found = page.evaluate("axe.run()")["violations"]
    return [f"{each['impact']} {each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_has_no_fault_and_is_used_by_keyboard(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(page_file.absolute().as_uri())
    page.evaluate(AXE.read_text(encoding="utf-8"))
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.querySelectorAll('.matrix')].filter((m) => m.offsetParent).length") == 1
    widths = "[...document.querySelectorAll('.matrix:not(.hidden)')].map((m) => [m.scrollWidth, m.parentElement.clientWidth])"
    assert all(inner <= outer for inner, outer in page.evaluate(widths)), "a matrix is clipped"

    alt = "document.querySelector('#viewer img').alt"
    page.focus("button.zoom")
    page.keyboard.press("Enter")
    first = page.evaluate(alt)
    assert faults(page) == []
    shown = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        shown.append(page.evaluate(alt))
    assert "1 step," in first
    assert ["2 steps," in each for each in shown] == [True, True, False, False]
    assert shown[1].partition(":")[0] != shown[0].partition(":")[0]
    assert shown[3] == first
    with page.expect_download() as download:
        page.click("#viewer a")
    assert download.value.suggested_filename.endswith(".webp")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "zoom"
    with page.expect_download() as download:
        page.click(".files a")
    assert download.value.suggested_filename.endswith("-numbers.csv")
    if page_file.name == "comparison.html":
        page.focus("table.sortable th button")
        page.keyboard.press("Enter")
        assert page.get_attribute("table.sortable th", "aria-sort") == "ascending"
        assert faults(page) == []
    assert errors == []
    context.close()
