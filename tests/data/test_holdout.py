"""Which samples of the user's own data are held out of training, and that they stay so."""

from pathlib import Path
from typing import Any

import pytest

from lcmdistill.data import holdout
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.holdout import FILE, RunCaptions, choose_captions, hold_out, is_own, read_captions, record_captions
from lcmdistill.data.sources.registry import make_source
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.errors import RunError
from tests.support.data import config_for, good, prepared, write_tar


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [(39, 0.05, 0), (40, 0.05, 4), (100, 0.05, 5), (1000, 0.05, 50), (9000, 0.05, 200), (1000, 0.0, 0), (50, 0.5, 25)],
)
def test_a_share_of_the_samples_is_held_out(samples: int, share: float, expected: int):
    record = choose_captions([f"caption {i}" for i in range(samples)], share)
    assert record.held_out == bool(expected)
    assert len(record.captions) == (expected or min(samples, 200))


def test_samples_of_one_caption_are_held_out_together():
    captions = [f"rare {i}" for i in range(30)] + ["common"] * 70 + [None] * 10
    record = choose_captions(captions, 0.05)
    assert len(record.captions) == 5
    assert all(caption.startswith("rare") for caption in record.captions)
    # With one caption for all images nothing can be held out.
    assert choose_captions(["a photo of sks dog"] * 60, 0.05) == RunCaptions(("a photo of sks dog",))
    # The order of the samples does not matter, so that runs on the same data can be compared.
    assert choose_captions(captions[::-1], 0.05) == record


def test_bundled_data_and_prompts_are_not_the_users_own(image_folder: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    own = {word: is_own(make_source(word)) for word in ("tiny", "teacher", str(image_folder))}
    assert own == {"tiny": False, "teacher": False, str(image_folder): True}
    assert is_own(make_source("teacher", prompts=str(tmp_path / "prompts.txt")))
    assert is_own(make_source(str(image_folder), prompts_only=True))


@pytest.fixture
def dataset(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that opens a data set of 12 samples, of which 4 are held out at least."""
    monkeypatch.setattr(holdout, "SMALLEST", 12)
    spec = str(write_tar(tmp_path / "data.tar", good(range(12))))
    folder = prepared(spec, config_for(spec, tmp_path / "cache"), teacher, 0)
    return lambda: LatentDataset([folder], [None])


def test_held_out_samples_are_not_in_the_data_set(dataset: Any, tmp_path: Path):
    whole, some = dataset(), dataset()
    record = hold_out(tmp_path, some, [True], 0.05)
    assert (len(whole), len(some), len(some.shapes), len(some.left_out)) == (12, 8, 8, 4)
    captions = whole.captions([True])
    assert [captions[i] for i in some.left_out] == sorted(record.captions, key=captions.index)
    assert set(some.captions([True])) == set(captions) - set(record.captions)
    remaining = [i for i in range(12) if i not in some.left_out]
    assert whole.read(remaining)[0].equal(some.read(range(8))[0])
    bundled = dataset()
    assert hold_out(tmp_path, bundled, [False], 0.05) == RunCaptions()
    assert len(bundled) == 12


def test_a_resumed_run_holds_out_what_it_was_started_with(dataset: Any, tmp_path: Path):
    record = RunCaptions(("picture 3", "picture 5"), True)
    record_captions(tmp_path, record, 2)
    resumed = dataset()
    assert hold_out(tmp_path, resumed, [True], 0.5) == record
    assert resumed.left_out == [3, 5]


def test_a_lost_record_is_found_again(dataset: Any, tmp_path: Path):
    record = hold_out(tmp_path, dataset(), [True], 0.05)
    assert record.held_out
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000005" / "state.pt").touch()
    assert hold_out(tmp_path, dataset(), [True], 0.05) == record


def test_a_damaged_record_is_an_error(tmp_path: Path):
    record_captions(tmp_path, RunCaptions(("a",), True), 1)
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text().replace('"a"', '"b"'))
    with pytest.raises(RunError, match="which captions are held out of training is not known"):
        read_captions(tmp_path)


def test_latents_of_an_earlier_version_are_not_held_out(
    dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from lcmdistill.data import dataset as module

    read = module.read_metadata
    monkeypatch.setattr(module, "read_metadata", lambda file: {**read(file), "captions": None})
    old = dataset()
    assert hold_out(tmp_path, old, [True], 0.05) == RunCaptions()
    assert len(old) == 12
    assert "1 file of cached latents, by an earlier version, have no captions" in capsys.readouterr().out
