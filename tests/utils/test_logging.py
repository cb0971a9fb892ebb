"""Messages: the log file of a run, and a console that breaks without ending the run."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lcmdistill.utils import logging as messages
from lcmdistill.utils.logging import log_file, progress
from tests.support.training import ROOT

logger = logging.getLogger("lcmdistill.tests")


def test_a_run_s_messages_and_warnings_are_in_its_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = warnings.showwarning
    for message in ("first é", "resumed"):
        with warnings.catch_warnings(), log_file(tmp_path):
            warnings.simplefilter("always")
            logger.debug("switches")
            logger.info(message)
            warnings.warn("a library's", UserWarning, stacklevel=1)
    logger.info("after")
    assert warnings.showwarning is show
    lines = [line for line in (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() if line[:2] == "20"]
    kinds = ["DEBUG", "INFO", "WARNING"]
    assert [line.split()[2] for line in lines] == 2 * kinds
    assert all(line.split()[3:5] == ["rank", "0"] for line in lines)
    assert lines[1].endswith("  first é")
    assert "a library's" in lines[2]
    output = capsys.readouterr()
    assert (output.out, output.err) == ("first é\nresumed\nafter\n", "")


def test_an_application_s_own_handlers_get_no_more_than_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Application(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            received.append(record.getMessage())

    root, application, received = logging.getLogger("lcmdistill"), Application(), list[str]()
    monkeypatch.setattr(root, "handlers", [application])
    with log_file(tmp_path):
        logger.debug("switches")
        logger.info("message")
    assert received == ["message"]
    assert root.handlers == [application]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_the_log_and_shows_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with log_file(tmp_path):
        logger.info("message")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("message\n", "")


def test_the_time_left_is_that_of_the_whole_command(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(messages, "clock", lambda: now[0])
    with progress("generating", 40, after=60.0) as bar:
        assert (bar.visible, bar.seconds_left, bar.left_text) == (False, None, "")
        bar.skip(20)  # cached before
        assert bar.seconds_left is None
        now[0] = 110.0
        bar.update(22.5)  # 2.5 units in 10 s, 17.5 to go
        assert bar.seconds_left == pytest.approx(70 + 60)
        assert bar.left_text == "left 2 min 10 s"
        now[0] = 120.0
        assert bar.seconds_left == pytest.approx(60 + 60)
        bar.update(25, left=30)
        now[0] = 125.0
        assert bar.seconds_left == pytest.approx(25)
        now[0] = 200.0
        assert bar.left_text == "left 0.0 s"
    with progress("reading", None) as bar:
        now[0] = 210.0
        bar.update(5)
        assert bar.seconds_left is None


SCRIPT = """
import logging
from lcmdistill.utils.logging import configure_console, progress
from lcmdistill.utils.runtime import configure_process
configure_process(); configure_console()
for i in range(5000):
    logging.getLogger("lcmdistill.x").info(f"line {i} é")
with progress("title", 3) as bar:
    bar.update(1)
raise SystemExit(3)  # it came to its end
"""


@pytest.mark.parametrize("output", ["| head -1", ">&-", "> out.txt", "2>&- | tail -1"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_console_that_cannot_show_messages_does_not_end_the_program(
    tmp_path: Path, output: str, encoding: str
) -> None:
    words = ["bash", "-c", f"'{sys.executable}' -c '{SCRIPT}' {output}; exit ${{PIPESTATUS[0]}}"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert (ended.returncode, ended.stderr) == (3, "")
    shown = {"ascii": "\\xe9", "utf-8": "é"}[encoding]
    if "head" in output:
        assert ended.stdout == f"line 0 {shown}\n"
    if "txt" in output:
        assert (tmp_path / "out.txt").read_text(encoding="utf-8").endswith(f"line 4999 {shown}\n")
