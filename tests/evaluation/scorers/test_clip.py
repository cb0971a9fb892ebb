"""The CLIP score and PickScore, on a small random CLIPModel, against their published formulas."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lcmdistill.evaluation.metrics.resize import CLIP_MEAN, CLIP_STD, clip_pixels
from lcmdistill.evaluation.scorers.base import scorer_metric
from lcmdistill.evaluation.scorers.clip import load_clip
from lcmdistill.evaluation.scorers.registry import SCORERS, parse_scorers
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.scorers import CPU, byte_images, image_pair, small_clip, write_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("scorers") / "clip")


def outputs(folder: Path, prompts: list[str], arrays: list[np.ndarray]) -> Any:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), cast(Any, CLIPProcessor).from_pretrained(folder)
    inputs = processor(text=prompts, images=arrays, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs)


def test_clip_score_is_a_hundred_cosines_and_pickscore_a_logit(clip_folder: Path):
    images = image_pair(3, 32)
    arrays = [image.permute(1, 2, 0).numpy() for image in byte_images(images)]
    out = outputs(clip_folder, list(images.prompts), arrays)
    metric = scorer_metric(SCORERS["clip"], str(clip_folder), CPU)
    found = metric.per_image(images).view(-1)
    torch.testing.assert_close(found, 100 * (out.image_embeds * out.text_embeds).sum(1))
    assert len({round(float(value), 3) for value in found}) == 3
    pick = scorer_metric(SCORERS["pickscore"], str(clip_folder), CPU)
    torch.testing.assert_close(pick.per_image(images).view(-1), out.logits_per_image.diagonal())
    assert metric.reduce(found.view(-1, 1).double()) == pytest.approx(float(found.mean()))
    assert metric.standard_error is not None
    assert metric.standard_error(found.view(-1, 1)) == pytest.approx(float(found.std()) / 3**0.5)
    assert "224 px" in metric.limits


def test_the_clip_score_of_dmd2_reduces_images_and_lengthens_prompts(clip_folder: Path):
    images = image_pair(2, 300)
    images = images._replace(pixels=images.pixels[:, :, :280])
    reduced = []
    for image in byte_images(images):
        square = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((10, 0, 290, 280))
        reduced.append(np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS)))
    out = outputs(clip_folder, [f"A photo depicts {prompt}" for prompt in images.prompts], reduced)
    found = scorer_metric(SCORERS["clip_dmd2"], str(clip_folder), CPU).per_image(images).view(-1)
    torch.testing.assert_close(found, 100 * (out.image_embeds * out.text_embeds).sum(1))


def test_a_folder_without_a_processor_gets_clips_own(tmp_path: Path):
    """As PickScore_v1 is published: a model only."""
    from transformers import CLIPTokenizer

    model = small_clip(vocabulary=49408)
    model.save_pretrained(tmp_path / "model")
    clip = load_clip(str(tmp_path / "model"), CPU, "pickscore", "")
    assert isinstance(clip.tokenizer, CLIPTokenizer)
    # "a red apple" in CLIP's published vocabulary of 49,408 tokens
    assert clip.tokenizer("a red apple").input_ids == [49406, 320, 736, 3055, 49407]
    images = byte_images(image_pair(1, 50))
    torch.testing.assert_close(clip.pixels(images), clip_pixels(images, 32))


@pytest.mark.parametrize(("size", "pad"), [((40, 60), False), ((60, 41), False), ((40, 60), True), ((61, 40), True)])
def test_pixels_are_resized_as_the_authors_do(size: tuple[int, int], pad: bool):
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    height, width = size
    if pad:
        scale = 32 / max(size)
        small = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        array = np.zeros((32, 32, 3), np.uint8)
        top, left = (32 - small.height) // 2, (32 - small.width) // 2
        array[top : top + small.height, left : left + small.width] = np.asarray(small)
    else:
        long = int(32 * max(size) / min(size))
        small = picture.resize((32, long) if height > width else (long, 32), Image.Resampling.BICUBIC)
        cut = round((long - 32) / 2)
        array = np.asarray(small)[cut : cut + 32] if height > width else np.asarray(small)[:, cut : cut + 32]
    expected = (array / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    found = clip_pixels(image, 32, pad=pad)[0].permute(1, 2, 0)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)


def test_a_long_prompt_is_truncated(clip_folder: Path):
    pair = image_pair(1, 32)._replace(prompts=("word " * 100,))
    assert scorer_metric(SCORERS["clip"], str(clip_folder), CPU).per_image(pair).isfinite().all()


def test_scorers_run_on_the_device_of_the_run(clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The meta device stands in for a GPU."""
    monkeypatch.setattr("lcmdistill.evaluation.scorers.clip.Clip.text_features", lambda self, prompts: torch.ones(1, 8))
    clip = load_clip(str(clip_folder), torch.device("meta"), "clip", "")
    features = clip.image_features(byte_images(image_pair(2, 32)))
    assert features.shape == (2, 8)
    assert features.device.type == "meta"


def test_other_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="holds no CLIP model; pass the folder or hub id of a transformers CLIPModel"):
        scorer_metric(SCORERS["clip"], str(tmp_path), CPU)
    with pytest.raises(UsageError, match=r"x\.pt is a file without a model description"):
        scorer_metric(SCORERS["clip"], str(tmp_path / "x.pt"), CPU)
    with pytest.raises(
        RunError, match="--scorer pickscore=nobody/nothing is neither a local path nor in the local hub cache"
    ):
        scorer_metric(SCORERS["pickscore"], "nobody/nothing", CPU)
    model: Any = small_clip()
    model.text_projection = nn.Identity()
    model.save_pretrained(tmp_path / "part")
    with pytest.raises(UsageError, match=r"lacks 1 weights of a CLIP model, such as text_projection\.weight"):
        scorer_metric(SCORERS["clip"], str(tmp_path / "part"), CPU)


def test_scorers_are_named_on_the_command_line():
    assert parse_scorers(["clip=a/b", "hpsv2=x.pt"]) == {"clip": "a/b", "hpsv2": "x.pt"}
    for word in ("a/b", "fid=x", "clip="):
        with pytest.raises(
            UsageError, match="must be NAME=MODEL, where NAME is one of clip, clip_dmd2, pickscore, hpsv2, "
        ):
            parse_scorers([word])
    with pytest.raises(UsageError, match="--scorer clip is specified twice"):
        parse_scorers(["clip=a", "clip=b"])


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_a_scorer_states_what_it_sees(scorer: Any):
    texts = (scorer.description, scorer.measured_on, scorer.limits, scorer.weights)
    assert all(text.strip() for text in texts)
    assert scorer.description.endswith(".")
    assert scorer.limits.endswith(".")
    assert SCORERS[scorer.key] is scorer
