"""Published protocols: what they need, what they compute, and what stands next to their numbers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lcmdistill.evaluation import evaluate as program
from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.metrics.features import ScriptedFeatures
from lcmdistill.evaluation.metrics.pretrained import frechet
from lcmdistill.evaluation.metrics.published_fid import (
    central_patch,
    published_fid_metrics,
    real_features,
    whole_image,
)
from lcmdistill.evaluation.options import EvaluationOptions, with_protocol
from lcmdistill.evaluation.protocols import PROTOCOLS, PublishedRun, deviations
from lcmdistill.report.page import evaluation_summary, write_report
from lcmdistill.utils.errors import UsageError
from tests.support.evaluated import results_of, shorten_references
from tests.support.scorers import image_pair

DMD2, SENSEFLOW = PROTOCOLS["coco10k-dmd2"], PROTOCOLS["coco5k-senseflow"]


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_missing_files_are_listed_in_one_sentence(protocol, tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        with_protocol(EvaluationOptions(protocol=protocol.key), tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"--protocol {protocol.key} needs these files in {tmp_path / protocol.key}: prompts.txt ("
    )
    assert "\n" not in message
    for needed in (protocol.prompts, protocol.inception, protocol.real):
        assert needed is None or f"{needed.name} ({needed.content}; or {needed.option})" in message
    for name, hub_id in protocol.scorers.items():
        assert f"{name} (hf download {hub_id}, or --scorer {name}=MODEL)" in message


def test_an_unknown_protocol_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="unknown --protocol coco; choose one of coco10k-dmd2, coco5k-senseflow"):
        with_protocol(EvaluationOptions(protocol="coco"), tmp_path)
    plain = EvaluationOptions()
    assert with_protocol(plain, tmp_path) is plain


def test_files_are_found_in_the_folder_or_where_options_say(tmp_path: Path):
    folder = tmp_path / DMD2.key
    for name in ("prompts.txt", "inception-2015-12-05.pt", "real", "clip_dmd2"):
        (folder / name).mkdir(parents=True)
    own = {"imagereward": "elsewhere.pt"}
    options = with_protocol(EvaluationOptions(protocol=DMD2.key, real="coco", scorers=own), tmp_path)
    assert options.num_images == 10_000
    assert options.prompts == str(folder / "prompts.txt")
    assert options.scorers == {"clip_dmd2": str(folder / "clip_dmd2"), **own}
    published = options.published
    assert published is not None
    assert (published.inception, published.real) == (folder / "inception-2015-12-05.pt", "coco")
    assert published.own == ("--real", "--scorer imagereward")
    # The real images of a protocol are for its FID only.
    assert (options.real, options.inception) == (None, None)
    # Without enough images for FID its files are not needed.
    shutil.rmtree(folder / "inception-2015-12-05.pt")
    few = with_protocol(EvaluationOptions(protocol=DMD2.key, num_images=100, scorers=own), tmp_path)
    assert few.published is not None
    assert (few.num_images, few.published.inception, few.published.real) == (100, None, None)


def test_every_deviation_is_named():
    exact: dict[str, Any] = {
        "images": 10_000,
        "prompts": 10_000,
        "resolution": 1024,
        "steps": (1, 4),
        "teacher": "50 steps",
    }
    always = (
        "the teacher's images with 50 steps instead of 50 steps at guidance scale 6",
        "start noise of other seeds",
    )
    assert deviations(PublishedRun(DMD2), **exact) == always
    assert deviations(PublishedRun(SENSEFLOW), **{**exact, "images": 5_000})[-1] == SENSEFLOW.assumptions[0]
    other: dict[str, Any] = {"images": 1_000, "prompts": 900, "resolution": 512, "steps": (2, 8), "teacher": "x"}
    assert deviations(PublishedRun(DMD2, own=("--prompts",)), **other)[:5] == (
        "1,000 images instead of 10,000, so there is no FID",
        "900 distinct prompts",
        "512 px instead of 1024 px",
        "steps 2, 8 instead of 4",
        "files of --prompts instead of the protocol's",
    )


class Statistics(nn.Module):
    """A feature network on pixels of Inception's size: means of channels and of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.shape[2] == 299
        means = images.float().mean((2, 3)) * self.weight
        return torch.cat([means, images[:, :, :150].float().mean((2, 3))], 1)


def pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    small = torch.rand(count, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)


def clean(image: Image.Image) -> np.ndarray:
    """clean-fid's resizing: each channel in fp32, by Pillow's bicubic filter, not rounded."""
    channels = np.asarray(image, np.float32).transpose(2, 0, 1)
    size = (299, 299)
    return np.stack(
        [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in channels]
    )


def test_images_are_resized_as_published():
    images = (pictures(1, 320, 400) * 255).round().byte()
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    square = picture.crop((40, 0, 360, 320))
    expected = clean(square.resize((512, 512), Image.Resampling.LANCZOS))
    torch.testing.assert_close(whole_image(512)(images)[0], torch.from_numpy(expected))
    torch.testing.assert_close(whole_image(None)(images)[0], torch.from_numpy(clean(square)), atol=1e-3, rtol=0)
    patch = picture.crop((50, 10, 349, 309))
    torch.testing.assert_close(central_patch(images)[0], torch.from_numpy(clean(patch)), atol=1e-3, rtol=0)
    small = images[..., :100, :120]
    expected = clean(Image.fromarray(small[0].permute(1, 2, 0).numpy()))
    torch.testing.assert_close(central_patch(small)[0], torch.from_numpy(expected))


def test_fid_to_real_images_of_any_size_and_to_the_teacher(tmp_path: Path):
    torch.jit.script(Statistics()).save(str(tmp_path / "inception.pt"))
    network = ScriptedFeatures(tmp_path / "inception.pt", "--inception")
    real = [*(pictures(6, 310, 330)), *(pictures(6, 64, 48))]
    (tmp_path / "real").mkdir()
    for i, pixels in enumerate(real):
        array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / "real" / f"{i:02d}.png")
    changes = (whole_image(64), central_patch)
    features = real_features(network, str(tmp_path / "real"), 12, changes)
    expected = [torch.cat([network(change((each[None] * 255).round().byte())) for each in real]) for change in changes]
    for found, own in zip(features, expected, strict=True):
        torch.testing.assert_close(found, own)
    pair = image_pair(3, 300)._replace(
        pixels=pictures(12, 300, 300), reference_pixels=pictures(12, 301, 301)[..., :300, :300]
    )
    to_real = published_fid_metrics(network, 64, features, 12, "coco10k-dmd2")
    assert list(to_real) == ["fid", "patch_fid"]
    images = (pair.pixels * 255).round().byte()
    for metric, change, reference in zip(to_real.values(), changes, expected, strict=True):
        found = metric.reduce(metric.per_image(pair).double())
        assert found == pytest.approx(frechet(network(change(images)).double(), reference), rel=1e-6)
    to_teacher = published_fid_metrics(network, None, None, 12, "coco5k-senseflow")
    assert list(to_teacher) == ["fid_teacher", "patch_fid_teacher"]
    metric = to_teacher["patch_fid_teacher"]
    same = pair._replace(reference_pixels=pair.pixels)
    assert metric.reduce(metric.per_image(same).double()) == pytest.approx(0, abs=1e-2)
    assert metric.reduce(metric.per_image(pair).double()) > 1
    assert metric.min_images == 12
    assert "coco5k-senseflow, with its deviations" in metric.published


def test_protocol_and_deviations_stand_next_to_the_numbers(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setitem(PROTOCOLS, SENSEFLOW.key, replace(SENSEFLOW, num_images=4, scorers={}))
    monkeypatch.setattr(program, "cache_root", lambda config: tmp_path)
    folder = tmp_path / "protocols" / SENSEFLOW.key
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("a red apple\na blue car\na green tree\na hat\n", encoding="utf-8")
    torch.jit.script(Statistics()).save(str(folder / "inception-2015-12-05.pt"))
    shorten_references(monkeypatch)
    evaluate([run], EvaluationOptions(protocol=SENSEFLOW.key, steps=(1,), guidance_scales=(4.0,), device="cpu"))
    results = results_of(run)
    assert {"fid_teacher", "patch_fid_teacher"} < set(results.metrics)
    assert results.number("fid_teacher", "student", 1) is not None
    side = results.info["resolution"]
    text = results.protocol
    assert text.startswith(
        "Protocol coco5k-senseflow: SenseFlow (Ge et al. 2025, arXiv:2506.00523), table 1. Deviations: "
    )
    assert f"{side} px instead of 1024 px; steps 1 instead of 4; the teacher's images with" in text
    assert text in evaluation_summary(run)
    assert text.replace("'", "&#39;") in write_report(run).read_text(encoding="utf-8")
    monkeypatch.setitem(PROTOCOLS, DMD2.key, replace(DMD2, num_images=4, scorers={}))
    (tmp_path / "protocols" / DMD2.key / "real").mkdir(parents=True)
    for name in ("prompts.txt", "inception-2015-12-05.pt"):
        shutil.copy(folder / name, tmp_path / "protocols" / DMD2.key)
    image = Image.new("RGB", (70, 50), "red")
    image.save(tmp_path / "protocols" / DMD2.key / "real" / "0.png")
    with pytest.raises(
        UsageError, match=r"compares with 4 real images, and .* has 1; pass all of them with --real, or fewer"
    ):
        evaluate([run], EvaluationOptions(protocol=DMD2.key, steps=(1,), guidance_scales=(4.0,), device="cpu"))
