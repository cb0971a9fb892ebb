"""Which prompts and which real images an evaluation uses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcmdistill.config.resolve import with_values
from lcmdistill.data.holdout import RunCaptions, read_captions
from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions, evaluated_run
from lcmdistill.evaluation.prompts import PromptChoice, common_captions
from lcmdistill.evaluation.select import real_images, real_sources, select_metrics
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.report.page import context
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import good
from tests.support.evaluated import results_of, shorten_references
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL

BUNDLED = PromptChoice(("a", "b"), "that were held out of training")


def test_runs_are_compared_with_the_same_real_images(small_run: Path, tmp_path: Path, image_folder: Path):
    each = evaluated_run(small_run)

    def sources(*data: str, real: str | None = None, prompts: str | None = None) -> tuple[str, ...]:
        some = [
            EvaluatedRun(each.run, with_values(each.config, {"data.sources": (spec,)}), each.model) for spec in data
        ]
        return real_sources(some, EvaluationOptions(real=real, prompts=prompts), BUNDLED)

    assert sources("teacher", str(image_folder), "tiny") == ("tiny",)
    assert sources("teacher", "tiny", real=str(image_folder)) == (str(image_folder),)
    with pytest.raises(
        UsageError, match=r"^--real elsewhere does not exist; pass a folder of images, .tar shards, or tiny$"
    ):
        sources("teacher", "tiny", real="elsewhere")
    # The prompts are not the captions of a user's own images.
    assert sources(str(image_folder)) == ()
    assert sources("tiny", prompts="own.txt") == ()
    # Nothing is downloaded and no command is run for a default.
    assert sources("teacher", "https://example.invalid/a.tar", "pipe:cat a.tar", str(tmp_path / "gone")) == ()


@pytest.mark.parametrize("kind", [UsageError, RunError])
def test_a_source_of_real_images_that_fails_is_named_by_its_option(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    def members(limit: int) -> list[Any]:
        raise kind("--data http://server/a.tar cannot be reached: the server responds 503")

    monkeypatch.setattr("lcmdistill.evaluation.select.make_source", lambda word: SimpleNamespace(members=members))
    with pytest.raises(kind, match=r"^--real http://server/a\.tar cannot be reached: the server responds 503$"):
        real_images(["http://server/a.tar"], 16, 2)


def test_captions_stand_for_a_users_images_if_they_are_enough(small_run: Path, image_folder: Path):
    each = evaluated_run(small_run)
    assert each.config.data.sources == (str(image_folder),)

    def sources(count: int) -> tuple[str, ...]:
        choice = PromptChoice(tuple(f"caption {i}" for i in range(count)) * 2, "held out of the run's own data", True)
        return real_sources([each], EvaluationOptions(), choice)

    assert sources(49) == ()
    assert sources(50) == (str(image_folder),)


def test_too_few_images_give_no_kid(small_run: Path, image_folder: Path, small_features: Path):
    run, cpu = evaluated_run(small_run), torch.device("cpu")
    few = select_metrics(run, EvaluationOptions(), (str(image_folder),), 16, cpu)
    assert not {"kid", "kid_teacher", "precision", "recall"} & set(few.metrics)
    with pytest.raises(UsageError, match=r"^--real is for KID, which needs 50 images, and 16 are generated"):
        select_metrics(run, EvaluationOptions(real=str(image_folder)), (str(image_folder),), 16, cpu)
    assert few.notes == ("KID, precision and recall need 50 images, and 16 were generated (--num-images 50).",)
    with pytest.raises(UsageError, match="needs at least 50 images, and --num-images is 16"):
        select_metrics(run, EvaluationOptions(features=small_features), (), 16, cpu)
    enough = select_metrics(run, EvaluationOptions(features=small_features), (str(image_folder),), 50, cpu)
    assert "kid" not in enough.metrics
    assert next(iter(enough.metrics)) == "kid_teacher"
    assert enough.notes == (f"KID to real images needs 50 of them, and {image_folder.name} has 12.",)
    requested = EvaluationOptions(features=small_features, real=str(image_folder))
    with pytest.raises(UsageError, match="has 12 images, and KID needs 50"):
        select_metrics(run, requested, (str(image_folder),), 50, cpu)


def test_several_runs_share_their_captions():
    one, two = RunCaptions(("a", "b", "c"), True), RunCaptions(("c", "b", "d"), True)
    assert common_captions([one, two]) == RunCaptions(("b", "c"), True)
    assert common_captions([one, RunCaptions(("b",), False)]) == RunCaptions(("b",), False)
    for other in (None, RunCaptions(), RunCaptions(("d",), True)):
        assert common_captions([one, other]) == RunCaptions()


def test_a_run_on_photos_is_evaluated_with_its_own_captions(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The case of a user with 60 photos: 4 of their captions are held out, which are too few for KID to the photos."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in good(range(60)):
        (photos / name).write_bytes(content)
    own: dict[str, Any] = {"teacher.model": str(small_teacher), "data.sources": (str(photos),)}
    own |= {"optim.max_train_steps": 1, "run.validate_every": 1, "data.max_samples": 60}
    run = distill(resolve({}, {**SMALL, **own, "run.output": str(tmp_path / "run")}))
    captions = read_captions(run)
    assert captions is not None
    assert (captions.held_out, len(captions.captions)) == (True, 4)
    assert "4 samples, of 4 captions, are held out" in (run / "log.txt").read_text()
    shorten_references(monkeypatch)
    evaluate([run], EvaluationOptions(steps=(1, 2), num_images=6, device="cpu"))
    results = results_of(run)
    assert set(results.info["preview_prompts"]) == set(captions.captions)
    assert not {"kid", "kid_teacher"} & set(results.metrics)
    page = context(run, resolve({}, {**SMALL, **own, "run.output": str(run)}))
    about = page["quality"]["about"]
    assert "6 images per row of 4 captions held out of the run's own data" in about
    assert "KID, precision and recall need 50 images, and 6 were generated" in about
    assert not any("real images" in reason for reason in verdict(results).reasons)


def test_fid_to_the_teacher_needs_no_real_images(
    small_run: Path, image_folder: Path, small_features: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcmdistill.evaluation.select.FID_IMAGES", 16)
    monkeypatch.setattr("lcmdistill.evaluation.metrics.pretrained.FID_IMAGES", 16)
    run, cpu, options = evaluated_run(small_run), torch.device("cpu"), EvaluationOptions(inception=small_features)
    for real, number in (((), 0), ((str(image_folder),), 12)):
        selected = select_metrics(run, options, real, 16, cpu)
        assert "fid_teacher" in selected.metrics
        assert "fid" not in selected.metrics
        assert (
            f"FID to real images needs 16 of them that belong to the prompts, and there are {number}." in selected.notes
        )
    requested = EvaluationOptions(inception=small_features, real=str(image_folder))
    with pytest.raises(UsageError, match="FID needs at least 16 real images"):
        select_metrics(run, requested, (str(image_folder),), 16, cpu)
