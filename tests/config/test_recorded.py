"""Recorded runs are read back into the same dataclasses; every setting is described."""

import re
from pathlib import Path

import pytest

from lcmdistill.config.recorded import check_recorded_file
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
    (tmp_path / "config.toml").write_text(to_toml(config) + "\n[new]\nsetting = 1\n# checksum: any\n")
    assert load_run_config(tmp_path) == config


def damaged(text: str) -> dict[str, bytes]:
    """A configuration in all the ways that it can be broken."""
    lines = text.splitlines(keepends=True)
    return {
        "empty": b"",
        "half": text.encode()[: len(text) // 2],
        "last line missing": "".join(lines[:-1]).encode(),
        "last section missing": text.partition("[run]")[0].encode(),
        "not text": b"\xff\xfe" + text.encode(),
        "a digit": text.replace("resolution = 64", "resolution = 65").encode(),
        "a type": text.replace("resolution = 64", 'resolution = "a"').encode(),
        "sections missing": b"resolution = 64\n",
    }


@pytest.mark.parametrize("how", ["missing", *damaged("")])
def test_a_damaged_configuration_of_a_run_is_refused_by_name(tmp_path: Path, how: str) -> None:
    """Otherwise its run would be sampled and resumed with other settings than it had."""
    text = to_toml(resolve({}, {"teacher.model": "tiny"}))
    (tmp_path / "metrics.jsonl").touch()
    path = tmp_path / "config.toml"
    if how != "missing":
        path.write_bytes(damaged(text)[how])
    with pytest.raises(UsageError, match=re.escape(str(path))):
        load_run_config(tmp_path)


@pytest.mark.parametrize("how", ["cut", "edited"])
def test_a_damaged_file_of_a_run_configures_no_other_run(tmp_path: Path, how: str) -> None:
    """Half of it would be a valid --config with other settings. A copy elsewhere belongs to the user."""
    text = to_toml(resolve({}, {"teacher.model": "tiny"}))
    path = tmp_path / "config.toml"
    path.write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    check_recorded_file(path)
    path.write_text({"cut": text[: len(text) // 2], "edited": text.replace("resolution = 64", "resolution = 32")}[how])
    with pytest.raises(UsageError, match=r"config\.toml was edited or damaged after the run wrote it"):
        check_recorded_file(path)
    check_recorded_file(path.rename(tmp_path / "mine.toml"))


def test_an_edited_configuration_is_taken_on_request(tmp_path: Path) -> None:
    text = to_toml(resolve({}, {"teacher.model": "tiny"}))
    edited = re.sub("# checksum: .*", "# checksum: any", text.replace("resolution = 64", "resolution = 32"))
    (tmp_path / "config.toml").write_text(edited)
    config = load_run_config(tmp_path)
    assert config is not None
    assert config.data.resolution == 32


def test_a_pickle_is_never_allowed_by_a_file(tmp_path: Path) -> None:
    settings = {"teacher.model": "tiny", "teacher.allow_pickle": True}
    config = resolve({}, settings)
    assert config.teacher.allow_pickle
    (tmp_path / "config.toml").write_text(to_toml(config))
    recorded = load_run_config(tmp_path)
    assert recorded is not None
    assert not recorded.teacher.allow_pickle
    with pytest.raises(UsageError, match=r"is not taken from a file; add --set teacher.allow_pickle=true"):
        resolve(settings, {})


def test_every_setting_has_a_description() -> None:
    table = settings_table(OBJECTIVES.locations)
    keys = [key for section in (*SECTIONS, "objective") for key in setting_keys(section, OBJECTIVES.locations)]
    assert all(setting_doc(key, OBJECTIVES.locations) for key in keys)
    assert all(f"| `{key}` |" in table for key in keys)
    assert "8e-6; tiny: 1e-4" in table
    assert "ddim; cd: heun" in table
