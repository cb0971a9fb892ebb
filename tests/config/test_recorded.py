"""Recorded runs are read back into the same dataclasses; every setting is described."""

from pathlib import Path

import pytest

from lcmdistill.config.reference import setting_doc, setting_keys, settings_table
from lcmdistill.config.schema import SECTIONS
from lcmdistill.config.toml import to_toml
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.recorded import load_run_config
from lcmdistill.utils.errors import UsageError
from tests.support.runs import resolve

OLD_KEYS = {"data.count": "data.max_samples", "optim.accumulate": "optim.gradient_accumulation_steps"}


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items())
def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str) -> None:
    section, _, key = old.partition(".")
    text = to_toml(resolve({}, {"teacher.model": "tiny"})).replace(f"[{section}]\n", f"[{section}]\n{key} = 2\n")
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=rf"earlier version: {old} is now called {new}; rename it in that file"):
        load_run_config(tmp_path)


def test_a_recorded_run_is_read_back_to_the_same_tree(tmp_path: Path) -> None:
    config = resolve({}, {"teacher.model": "tiny", "objective.name": "tcd", "data.flip": True})
    (tmp_path / "config.toml").write_text(to_toml(config) + "\n[new]\nsetting = 1\n")
    assert load_run_config(tmp_path) == config


def test_every_setting_has_a_description() -> None:
    table = settings_table(OBJECTIVES.locations)
    keys = [key for section in (*SECTIONS, "objective") for key in setting_keys(section, OBJECTIVES.locations)]
    assert all(setting_doc(key, OBJECTIVES.locations) for key in keys)
    assert all(f"| `{key}` |" in table for key in keys)
    assert "1e-6; tiny: 1e-4" in table
    assert "ddim; cd: heun" in table
