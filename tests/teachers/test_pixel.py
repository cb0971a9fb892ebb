"""Teachers in pixel space: how they describe themselves, and that they draw as their papers' samplers do."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.diffusion.parameterization import EDM
from lcmdistill.diffusion.schedules import KarrasSchedule, VPSchedule
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.pixel import class_names
from lcmdistill.training.preflight import check_early, validate_for_teacher
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.utils.errors import UsageError
from tests.support.data import prepared, surveyed
from tests.support.pixel import images, noise
from tests.support.pixel_models import LABELS, build_pixel
from tests.support.runs import resolve


def rescheduled(folder: Path, **changes: Any) -> Path:
    """A teacher's folder with its scheduler's config changed."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_a_teacher_is_read_from_its_files(tmp_path: Path, labels: tuple[str, ...], channels: int) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", labels, channels=channels)))
    assert (teacher.prediction_type, teacher.schedule) == (EDM, KarrasSchedule())
    assert (teacher.vae_factor, teacher.vae.config.latent_channels) == (1, channels)
    assert class_names(teacher.network) == labels
    z, t, c = teacher.example(2, 8, "cpu")
    assert teacher.call(teacher.network, z, t, c.values, None).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_latents_are_the_pixels(tmp_path: Path, channels: int) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", channels=channels)))
    pixels = noise(2, channels, 8, 8).clamp(-1, 1).expand(-1, 3, -1, -1)
    mean, std = teacher.encode_images(pixels)
    torch.testing.assert_close(mean, pixels[:, :channels])
    assert not std.any()
    torch.testing.assert_close(teacher.decode(mean), (pixels + 1) / 2)


def test_prompts_are_the_names_of_classes(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    assert teacher.encode_prompts(["bag", "ankle boot", "", "COAT"])["class_labels"].tolist() == [2, 1, 3, 0]
    with pytest.raises(UsageError, match="'a cat' is not a class of this model; choose from coat, Ankle boot, bag"):
        teacher.encode_prompts(["bag", "a cat"])
    nameless = load_teacher(str(build_pixel(tmp_path / "n", (), num_class_embeds=4)))
    assert nameless.encode_prompts(["3", "0"])["class_labels"].tolist() == [3, 0]
    condition = nameless.encode_prompts(["2"])
    assert condition.with_prompt(nameless.encode_prompts([""])).values == condition.values  # no class stands for none
    assert nameless.example(2, 8, "cpu")[2]["class_labels"].tolist() == [0, 0]
    plain = load_teacher(str(build_pixel(tmp_path / "u", ())))
    assert not plain.encode_prompts(["anything at all", ""]).values


def test_what_prompts_mean_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    variants = [LABELS, LABELS[::-1], ()]
    folders = [build_pixel(tmp_path / str(i), labels) for i, labels in enumerate(variants)]
    folders.append(build_pixel(tmp_path / "rgb", channels=3))
    prints = {load_teacher(str(folder)).fingerprint(with_network=False) for folder in folders}
    assert len(prints) == len(folders)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_timestep_scale": None}, "250 ln"),
        ({"sigma_data": 1.0}, "sigma_data is 1.0"),
        ({"prediction_type": "v_prediction"}, "epsilon as its prediction_type"),
    ],
)
def test_another_preconditioning_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(str(rescheduled(build_pixel(tmp_path / "t"), **changes)))


def test_a_network_of_other_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes 3 channels and returns 6"):
        load_teacher(str(build_pixel(tmp_path / "t", channels=3, out_channels=6)))


def edm_sampler(unet: Any, labels: Tensor | None, latents: Tensor, steps: int) -> Tensor:
    """Karras et al. 2022, Alg. 1 and Table 1, written out as in the paper, in float64."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        sd = 0.5
        c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
        c_in, c_noise = 1 / math.sqrt(sd**2 + sigma**2), math.log(sigma) / 4
        time = torch.full((len(x),), 1000 * c_noise)
        with torch.no_grad():
            return c_skip * x + c_out * unet((c_in * x).float(), time, labels, return_dict=False)[0].double()

    rho, low, high = 7, 0.002, 80
    t = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    t.append(0.0)
    x = latents.double() * t[0]
    for i in range(steps):
        d = (x - denoise(x, t[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_next = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d / 2 + d_next / 2)
        x = x_next
    return x.float()


@pytest.mark.parametrize("steps", [2, 6, 18])
@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_a_teacher_samples_like_edm(tmp_path: Path, labels: tuple[str, ...], steps: int) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", labels)))
    start, classes = noise(3, 1, 8, 8), torch.tensor([2, 0, 3]) if labels else None
    drawn = teacher.generate_latents(["bag", "coat", ""], start, steps=steps, guidance_scale=1.0, scheduler="any")
    torch.testing.assert_close(drawn, edm_sampler(teacher.network, classes, start, steps), rtol=1e-3, atol=1e-3)


def test_guidance_acts_between_a_class_and_no_class(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    start = noise(1, 1, 8, 8).expand(2, -1, -1, -1)
    plain, guided = (
        teacher.generate_latents(["bag", ""], start, steps=4, guidance_scale=scale, scheduler="any")
        for scale in (1.0, 3.0)
    )
    assert (plain[0] - guided[0]).abs().max() > 1e-3
    torch.testing.assert_close(plain[1], guided[1], rtol=1e-4, atol=1e-4)


def test_a_vp_network_of_pixels_is_a_teacher_too(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", channels=3, vp=True)))
    assert teacher.prediction_type == "epsilon"
    assert isinstance(teacher.schedule, VPSchedule)
    drawn = teacher.generate_latents(["bag"], noise(1, 3, 8, 8), steps=3, guidance_scale=1.0, scheduler="any")
    assert drawn.shape == (1, 3, 8, 8)
    assert drawn.isfinite().all()


def test_captions_are_classes_and_others_are_counted(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    folder = images(tmp_path / "images", ["Bag", "a cat", " ankle  boot", None, "bag", ""])
    config = DataConfig(sources=(str(folder),), resolution=8, cache_dir=str(tmp_path / "cache"))
    (report,) = surveyed(config, seconds=9.0, rejects=teacher.rejects)
    assert str(report) == "3 kept, 3 dropped: 3 x caption names no class of the teacher"
    dataset = LatentDataset([prepared(str(folder), config, teacher, 0)], [None])
    assert str(dataset.reports[0]) == str(report)
    mean, std, cond, _ = dataset.read(range(3))
    assert {(round(float(m.mean() + 1) * 127.5), int(c)) for m, c in zip(mean, cond["class_labels"], strict=True)} == {
        (0, 2),
        (40, 1),
        (80, 2),
    }
    assert mean.shape == (3, 1, 8, 8)
    assert not std.any()


def test_an_unconditional_network_needs_no_captions(tmp_path: Path) -> None:
    model, folder = build_pixel(tmp_path / "t", ()), images(tmp_path / "images", [None, "a cat", None])
    own = {"data.cache_dir": str(tmp_path / "cache"), "run.output": str(tmp_path / "run")}
    config = resolve({}, {"teacher.model": str(model), "data.sources": (str(folder),), **own})
    check_early(config)
    teacher = load_teacher(str(model))
    config = resolve_run_defaults(config, 1, teacher)
    assert (config.data.resolution, config.data.guidance_scale) == (8, 1.0)
    dataset = LatentDataset([prepared(str(folder), config.data, teacher, 0)], [None])
    mean, _, cond, _ = dataset.read([0, 2])
    assert (len(dataset), mean.shape, cond.values) == (3, (2, 1, 8, 8), {})
    with pytest.raises(UsageError, match=r"2 x no caption|3 x no caption"):
        surveyed(DataConfig(sources=(str(images(tmp_path / "more", [None, None])),)), seconds=9.0)


@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_a_teacher_without_data_generates_its_own_classes(tmp_path: Path, labels: tuple[str, ...]) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", labels)))
    own: dict[str, Any] = {"resolution": 8, "teacher_steps": 3, "guidance_scale": 1.0, "max_samples": 7}
    config = DataConfig(sources=("teacher",), cache_dir=str(tmp_path / "cache"), **own)
    dataset = LatentDataset([prepared("teacher", config, teacher, 0)], [7])
    mean, _, cond, _ = dataset.read(range(7))
    assert len(mean.flatten(1).unique(dim=0)) == 7
    if labels:
        assert cond["class_labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_another_size_than_the_teacher_s_is_refused(tmp_path: Path) -> None:
    model = str(build_pixel(tmp_path / "t"))
    config = resolve({}, {"teacher.model": model, "data.resolution": 16})
    with pytest.raises(UsageError, match="this pixel-space teacher has 8 pixels; pass --resolution 8"):
        validate_for_teacher(config, load_teacher(model))
