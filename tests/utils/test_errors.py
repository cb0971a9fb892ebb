"""Every failure of the surroundings ends in one sentence."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcmdistill.utils.errors import explain
from tests.support.training import ROOT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_full_disk_in_all_its_forms(number: int, foreign: bool) -> None:
    text = os.strerror(number)
    error = RuntimeError(f"I/O error: {text} (os error {number})") if foreign else OSError(number, text)
    sentence, code = explain(error)
    assert code == 1
    assert sentence.endswith("free some space or choose another --output (checkpoints already written are intact)")
    assert sentence.startswith(
        {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota"}.get(number, "a file is la")
    )


def test_paths_that_no_system_takes_are_named_in_short() -> None:
    name = "x" * 5000
    sentence, code = explain(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name))
    assert (code, sentence) == (1, f"a path or name is too long: {'x' * 60}... (5000 characters); choose a shorter one")
    with pytest.raises(UnicodeEncodeError) as caught:
        "a\udcff".encode()
    assert explain(caught.value) == ("a name or text is not UTF-8: 'a\\udcff'; rename or re-encode it", 1)
    with pytest.raises(UnicodeEncodeError) as caught:
        f"{'x' * 5000}\udcff{'y' * 5000}".encode()
    sentence, _ = explain(caught.value)
    assert sentence == f"a name or text is not UTF-8: '{'x' * 30}\\udcff{'y' * 30}'; rename or re-encode it"


def test_an_unknown_home_folder_is_named() -> None:
    sentence, code = explain(RuntimeError("Could not determine home directory."))
    assert (code, sentence) == (1, "your home folder is unknown; set HOME, or LCMDISTILL_CACHE to a folder for caches")


@pytest.mark.parametrize("arguments", ["--help", "info {run}/pipeline", "info nothing-there"])
@pytest.mark.parametrize(
    "surroundings",
    ["mkdir gone; cd gone; rmdir ../gone; {command}", "env -u HOME {command}", "{command} >&-", "{command} | true"],
)
def test_odd_surroundings_end_in_a_sentence_or_work(
    tmp_path: Path, small_run: Path, surroundings: str, arguments: str
) -> None:
    command = f"'{sys.executable}' -m lcmdistill {arguments.format(run=small_run)}"
    script = f"set -o pipefail; {surroundings.format(command=command)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # with it, the first line already notices the closed pipe
    ended = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 1
    if "nothing-there" in arguments:
        assert ended.returncode in (1, 2)
        assert ended.stderr.startswith("Error: ")
    else:
        assert (
            ended.returncode in (0, 141) if "true" in surroundings else ended.returncode == 0 or "gone" in surroundings
        )
    if "true" in surroundings and "nothing-there" not in arguments:
        assert ended.stderr == ""


def test_a_folder_in_place_of_a_file_and_a_missing_package() -> None:
    error = IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "runs/a/log.txt")
    sentence = "runs/a/log.txt is a folder where a file is expected; move or rename that folder"
    assert explain(error) == (sentence, 1)
    sentence, code = explain(ImportError("quanto is not installed\nmore"))
    assert (code, sentence.startswith("a package is missing: quanto is not installed; install it")) == (1, True)
