"""The report in headless Chromium at two widths, light and dark. Skipped if Chromium is not installed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.report.comparison import write_comparison
from lcmdistill.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]

FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]

# Loads the page in frames as wide as a phone and a desktop, and writes what the browser computed into the DOM for --dump-dom.
PROBE = """<!doctype html><title>probe</title><body><pre id="result">waiting</pre><script>
const widths = [390, 1280], results = {};
const frames = widths.map((width) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:1500px;border:0`;
  frame.srcdoc = PAGE;
  document.body.append(frame);
  return frame;
});
const look = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, slider = page.querySelector("#when");
  const seen = (name) =>
    Array.from(page.querySelectorAll(`[data-of=${name}]`)).map((each) => view.getComputedStyle(each).display !== "none");
  const found = { inner: view.innerWidth, scroll: page.documentElement.scrollWidth };
  const loaded = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  found.loaded = loaded.filter((name) => !name.startsWith("data:"));
  const broken = (image) => image.complete && !image.naturalWidth && image.loading !== "lazy";
  found.broken = Array.from(page.images).filter(broken).length;
  found.images = page.images.length;
  found.background = view.getComputedStyle(page.body).backgroundColor;
  const chart = page.querySelector("svg.chart[role=img]");
  const line = chart.querySelector("path[style*='--l']");
  found.chart = chart.getBoundingClientRect().width;
  found.line = view.getComputedStyle(line).stroke;
  found.tables = page.querySelectorAll("[data-of=matrix]").length;
  if (slider) {
    found.before = seen("grids");
    slider.value = 0;
    slider.dispatchEvent(new view.Event("input"));
    found.after = seen("grids");
    found.spoken = slider.getAttribute("aria-valuetext");
    found.output = page.querySelector("#when-value").textContent;
  }
  const select = page.querySelector("#prompt");
  select.value = select.options.length - 1;
  select.dispatchEvent(new view.Event("input"));
  found.tablesSeen = seen("matrix");
  return found;
};
Promise.all(frames.map((frame) => new Promise((done) => (frame.onload = done)))).then(() => {
  frames.forEach((frame, i) => (results[widths[i]] = look(frame)));
  document.getElementById("result").textContent = JSON.stringify(results);
});
</script>"""


def inspect(page: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Return what the browser computed for a page at each width, and its console messages."""
    probe = folder / "probe.html"
    source = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/").replace("<!--", "<\\!--")
    probe.write_text(PROBE.replace("PAGE", source, 1), encoding="utf-8")
    assert CHROMIUM is not None
    profile = folder / f"profile-{len(flags)}"
    environment = {**os.environ, "HOME": str(folder)}
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    process = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=180, env=environment)
    match = re.search(r'<pre id="result">(.*?)</pre>', process.stdout, re.DOTALL)
    assert match, process.stderr[-2000:]
    text = match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), "\n".join(line for line in process.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_works_in_a_browser(evaluated_run: Path, tmp_path: Path, dark: bool):
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    results, console = inspect(write_report(evaluated_run), tmp_path, *flags)
    assert console == ""
    assert set(results) == {"390", "1280"}
    for width, found in results.items():
        assert found["inner"] == int(width)
        assert found["scroll"] <= int(width), "the page is wider than its window"
        assert found["loaded"] == []
        assert found["broken"] == 0
        assert found["images"] > 20
        assert found["before"] == [False, True]
        assert found["after"] == [True, False]
        assert (found["spoken"], found["output"]) == ("0", "0")
        assert found["tablesSeen"] == [False, False, True]
        assert found["chart"] > 250
        assert found["line"].startswith("rgb("), "a chart has no color of the page"
        dim = all(int(value) < 60 for value in re.findall(r"\d+", found["background"])[:3])
        assert dim == dark


def test_the_comparison_works_in_a_browser(evaluated_run: Path, tmp_path: Path):
    other = tmp_path / "other-lcm"
    shutil.copytree(evaluated_run, other)
    results, console = inspect(write_comparison([evaluated_run, other], tmp_path / "c.html"), tmp_path)
    assert console == ""
    for width, found in results.items():
        assert found["scroll"] <= int(width)
        assert found["loaded"] == []
        assert found["tablesSeen"] == [False, False, True]
