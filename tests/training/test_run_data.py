"""Resuming a run: the same data may be spelled otherwise or have moved, other data are refused, damage is reported."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.sources.registry import make_sources
from lcmdistill.objectives.recorded import load_run_config
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.run_data import FILE, read_record, record_of
from lcmdistill.training.run_settings import check_run, finished, finished_message, open_run
from lcmdistill.utils.errors import UsageError


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Teacher:
    return load_teacher(str(small_teacher))


def changed(run: Path, *sources: str, prompts: str | None = None) -> RunConfig:
    """Return a run's configuration with other data, as a command that resumes it has it."""
    config = load_run_config(run)
    assert config is not None
    data = replace(config.data, sources=sources or config.data.sources, prompts=prompts)
    return replace(config, data=data, run=replace(config.run, output=str(run)))


def reopen(run: Path, teacher: Teacher, *sources: str, prompts: str | None = None) -> None:
    """Check a run's data with the teacher loaded, and record them."""
    config = changed(run, *sources, prompts=prompts)
    open_run(config, record_of(make_sources(config.data, seed=config.run.seed), config, teacher), config)


def test_the_same_data_may_be_spelled_otherwise(
    run: Path, teacher: Teacher, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(image_folder)
    shutil.copytree(image_folder, tmp_path / "moved", copy_function=shutil.copy2)
    monkeypatch.chdir(image_folder.parent)
    name = image_folder.name
    for word in (name, f"{name}/", f"./{name}", f"{image_folder}/", f"{tmp_path}/link", f"{tmp_path}/moved"):
        check_run(changed(run, word))
        reopen(run, teacher, word)
        assert [each.word for each in read_record(run) or ()] == [word]
        assert changed(run).data.sources == (word,)


def test_a_run_that_has_moved_is_resumed(run: Path, teacher: Teacher, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    check_run(changed(moved))
    reopen(moved, teacher)
    assert finished(changed(moved))
    assert finished_message(changed(moved)) == f"{moved} is already finished with 4 steps; nothing to do"


def test_fewer_steps_than_a_finished_run_has_are_not_claimed(run: Path) -> None:
    config = changed(run)
    fewer = replace(config, optim=replace(config.optim, max_train_steps=1))
    sentence = f"{run} is already finished with 4 steps and keeps them; for a run of 1 steps use another --output"
    assert finished_message(fewer) == sentence


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_finished_run_whose_student_is_damaged_is_not_called_finished(run: Path, how: str) -> None:
    file = run / "pipeline" / "vae" / "config.json"
    if how == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text() + " ")
    with pytest.raises(UsageError, match=rf"{re.escape(str(file))} .*; restore it or, for a run, remove"):
        finished_message(changed(run))


def test_an_output_that_is_not_utf8_is_refused(run: Path) -> None:
    config = changed(run)
    with pytest.raises(UsageError, match=r"--output '.*a\\udcff' is not UTF-8"):
        check_run(replace(config, run=replace(config.run, output=str(run.with_name("a\udcff")))))


def test_other_data_are_refused(run: Path, image_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "copy", copy_function=shutil.copy2)
    next(copy.glob("*.txt")).write_text("another caption")
    for sources in ((str(copy),), (str(image_folder), str(image_folder)), ("tiny",)):
        with pytest.raises(UsageError, match=r"contains a run with data\.sources = .* \(this command: "):
            check_run(changed(run, *sources))
    with pytest.raises(UsageError, match="does not exist"):
        check_run(changed(run, "no-such-data"))


def test_prompts_may_be_spelled_otherwise(run: Path, teacher: Teacher, tmp_path: Path) -> None:
    prompts, other = tmp_path / "prompts.txt", tmp_path / "other.txt"
    prompts.write_text("a cat\na dog\n")
    (run / FILE).unlink()
    reopen(run, teacher, "teacher", prompts=str(prompts))
    other.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\na dog")
    check_run(changed(run, "teacher", prompts=str(other)))
    other.write_text("a cat\na cow")
    with pytest.raises(UsageError, match=r"contains a run with data\.prompts = "):
        check_run(changed(run, "teacher", prompts=str(other)))
    with pytest.raises(UsageError, match=r"contains a run with data\.prompts = "):
        check_run(changed(run, "teacher"))
    prompts.write_text("a cat\na cow")
    with pytest.raises(UsageError, match=r"--data teacher changed .* since the run in .*run started"):
        reopen(run, teacher, "teacher", prompts=str(prompts))


def test_other_weights_are_refused_as_such(run: Path, small_teacher: Path) -> None:
    other = load_teacher(str(small_teacher))
    next(other.vae.parameters()).data.view(-1)[0] += 1
    with pytest.raises(UsageError, match=r"weights of the teacher .*small changed since .*; restore them"):
        reopen(run, other)


def _damaged(name: str, whole: bytes) -> bytes:
    """Return a damaged record."""
    if name == "flipped":
        at = whole.index(b'"content"') + 14
        return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    contents: dict[str, Any] = {"empty": b"", "half": whole[: len(whole) // 2], "byte": b"{", "list": b"[]"}
    contents |= {"not text": b"\xff\xfe" + whole, "deep": b"[" * 100_000, "shape": b'{"digest": "", "sources": [[]]}'}
    return contents[name]


@pytest.mark.parametrize("damage", ["empty", "half", "byte", "list", "not text", "deep", "shape", "flipped"])
def test_a_damaged_record_is_reported_and_repaired(
    run: Path, teacher: Teacher, caplog: pytest.LogCaptureFixture, image_folder: Path, damage: str
) -> None:
    whole = (run / FILE).read_bytes()
    (run / FILE).write_bytes(_damaged(damage, whole))
    assert read_record(run) is None
    check_run(changed(run))
    with pytest.raises(UsageError, match=r"contains a run with data\.sources = "):
        check_run(changed(run, f"{image_folder}/"))
    reopen(run, teacher)
    assert f"{FILE} is damaged: whether the data have changed" in caplog.text
    assert (run / FILE).read_bytes() == whole
    assert json.loads(whole)["sources"][0]["word"] == str(image_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_other_damaged_marks_end_no_run(run: Path, content: bytes) -> None:
    for name in (".requested.json", ".finished"):
        (run / name).write_bytes(content)
    check_run(changed(run))
    assert not finished(changed(run))
