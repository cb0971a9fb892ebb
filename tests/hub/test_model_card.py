"""The card of a run: rendered again from what the run records, and never over a user's own text."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lcmdistill.export.sampling_facts import Betas, SamplingFacts
from lcmdistill.hub.model_card import RECORD, export_card, recorded_facts, update_run_card, write_run_card
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.logging import configure_console
from tests.support.finished_runs import finished_run


def test_an_edited_card_is_not_overwritten(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    configure_console()
    assert update_run_card(run)
    card = (run / "README.md").read_text()
    assert "\n## Measured\n" in card
    (run / "README.md").write_text(card + "\nMy own notes.\n")
    capsys.readouterr()
    assert not update_run_card(run)
    assert (
        capsys.readouterr().out
        == f"{run}/README.md was edited and is not overwritten; remove it to generate it again\n"
    )
    assert (run / "README.md").read_text().endswith("My own notes.\n")
    (run / "README.md").unlink()
    assert update_run_card(run)
    assert (run / "README.md").read_text() == card


def test_a_card_without_a_record_is_the_users_own(evaluated_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    before = export_card(run, "single-file", "me/mine", "a.safetensors").text
    (run / RECORD).unlink()
    assert not update_run_card(run)
    assert export_card(run, "single-file", "me/mine", "a.safetensors").text == before


def test_betas_and_absent_parts_of_a_record_are_read_back(small_run: Path, tmp_path: Path) -> None:
    betas = Betas("linear", 0.001, 0.02, 1000)
    facts = SamplingFacts(betas=betas, absent_parts=("text_encoder_3", "tokenizer_3"))
    (tmp_path / RECORD).write_text(json.dumps({"facts": dataclasses.asdict(facts)}))
    assert recorded_facts(tmp_path, require_run_config(small_run)) == facts


def test_a_card_whose_record_a_kill_prevented_gets_it(small_teacher: Path, tmp_path: Path) -> None:
    run = finished_run(small_teacher, "full", tmp_path / "run")
    record = (run / RECORD).read_bytes()
    (run / RECORD).unlink()
    write_run_card(require_run_config(run), run, load_teacher(str(small_teacher)))
    assert (run / RECORD).read_bytes() == record
