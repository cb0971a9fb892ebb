"""Teachers: found by name, folder or hub id, read as they describe themselves, and refused in one sentence."""

import json
import shutil
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmdistill.report.info import describe
from lcmdistill.teachers import base, compat
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.naming import ALIASES
from lcmdistill.teachers.registry import supported_classes
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.teachers import build_teacher, edited


def pickled(folder: Path, to: Path, part: str) -> Path:
    """A copy of a teacher's folder with one part's weights as a pickle."""
    shutil.copytree(folder, to)
    (weights,) = (to / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), to / part / name)
    weights.unlink()
    return to


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_the_scheduler_s(tmp_path: Path, prediction_type: str) -> None:
    assert load_teacher(str(build_teacher(tmp_path / "teacher", prediction_type))).prediction_type == prediction_type


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "trained": {"trained_betas": [0.001 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_the_scheduler_s(tmp_path: Path, small_teacher: Path, name: str) -> None:
    from diffusers import DDIMScheduler

    file = "scheduler/scheduler_config.json"
    folder = edited(small_teacher, tmp_path / "teacher", file, lambda config: {**config, **SCHEDULES[name]})
    teacher = load_teacher(str(folder))
    reference: Any = DDIMScheduler.from_config(json.loads((folder / file).read_text()))
    schedule: Any = teacher.schedule
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert float(schedule.alphas_cumprod[-1]) == (
        0.0 if name == "zero-snr" else pytest.approx(float(reference.alphas_cumprod[-1]))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "sigmoid", "_class_name": "DDPMScheduler"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow_prediction", "_class_name": "DPMSolverMultistepScheduler"}, "'flow_prediction'"),
        ({"trained_betas": [0.02] * 100}, "has 100 trained_betas but num_train_timesteps = 1000"),
        # The betas of the scheduler before it are still in the file, and nothing reads them.
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "is a EDMDPMSolverMultistepScheduler, which has no betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "has invert_sigmas"),
    ],
)
def test_what_is_no_vp_teacher_is_refused(
    tmp_path: Path, small_teacher: Path, changes: dict[str, Any], message: str
) -> None:
    kind = changes.get("_class_name", "DDIMScheduler")
    folder = edited(
        small_teacher, tmp_path / "teacher", "scheduler/scheduler_config.json", lambda config: {**config, **changes}
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    with pytest.raises(UsageError, match=message):
        load_teacher(str(folder))


def test_a_folder_has_no_revisions(small_teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"--revision is 'main', and .* is a local path"):
        load_pipeline(str(small_teacher), revision="main")


def test_scale_and_shift_are_the_vae_s(tmp_path: Path, small_teacher: Path) -> None:
    folder = edited(
        small_teacher,
        tmp_path / "teacher",
        "vae/config.json",
        lambda config: {**config, "scaling_factor": 0.3, "shift_factor": 0.1},
    )
    teacher = load_teacher(str(folder))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = teacher.encode_images(pixels)
    with torch.no_grad():
        posterior = teacher.vae.encode(pixels).latent_dist
        plain = teacher.vae.decode(posterior.mean).sample
    torch.testing.assert_close(mean, (posterior.mean - 0.1) * 0.3)
    torch.testing.assert_close(std, posterior.std * 0.3)
    torch.testing.assert_close(teacher.decode(mean), (plain / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert teacher.vae_factor == 2


def test_everything_is_frozen_and_in_fp32(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    for part in (teacher.network, teacher.vae, teacher.pipeline.text_encoder):
        assert not part.training
        assert {(p.requires_grad, p.dtype) for p in part.parameters()} == {(False, torch.float32)}


def test_prompts_are_encoded_as_the_pipeline_does(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    embeds = teacher.encode_prompts(["a cat", ""])["prompt_embeds"]
    assert (embeds.shape, embeds.dtype) == ((2, 77, 16), torch.float32)
    tokenizer, encoder = teacher.pipeline.tokenizer, teacher.pipeline.text_encoder
    tokens = tokenizer(["a cat", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(embeds, encoder(tokens)[0])
    long = "x " * 500  # longer than the text encoder's 77 positions
    assert teacher.encode_prompts([long])["prompt_embeds"].shape == (1, 77, 16)


def test_a_sample_equals_the_pipeline_s_and_keeps_its_scheduler(small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    before = teacher.pipeline.scheduler
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = teacher.generate_latents(["a cat"], noise, steps=3, guidance_scale=3.0, scheduler="DDIMScheduler")
    assert teacher.pipeline.scheduler is before
    expected = teacher.pipeline(
        "a cat", latents=noise, num_inference_steps=3, guidance_scale=3.0, height=16, width=16, output_type="latent"
    ).images
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_a_hub_id_or_a_bundled_folder(alias: str) -> None:
    assert ALIASES[alias].count("/") == 1 or Path(ALIASES[alias]).is_dir()


def test_a_hub_id_goes_to_the_hub_with_its_revision_and_variant(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    half = Path(shutil.copytree(small_teacher, tmp_path / "half"))
    for path in half.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(half if options["variant"] else small_teacher)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    load_pipeline("sd15")
    load_pipeline("owner/name", revision="abc", variant="fp16", allow_pickle=True)
    assert [name for name, _ in asked] == ["stable-diffusion-v1-5/stable-diffusion-v1-5", "owner/name"]
    (_, plain), (_, special) = asked
    assert (plain["use_safetensors"], plain["revision"], plain["variant"]) == (True, None, None)
    assert (special["use_safetensors"], special["revision"], special["variant"]) == (None, "abc", "fp16")


@pytest.mark.parametrize("name", ["no-such-teacher", "a/b/c", "./a/b", "/no/such", "~/no-such"])
def test_a_wrong_name_is_refused_with_what_is_there(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_teacher(name)
    assert repr(name) in str(caught.value)
    assert all(alias in str(caught.value) for alias in ALIASES)


def test_a_hub_that_cannot_be_reached_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(RunError) as caught:
        load_teacher("owner/no-such-teacher")
    assert time.monotonic() - began < 10
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in ("local cache (", "HF_HUB_OFFLINE is set", "--teacher tiny"):
        assert part in sentence


def test_a_file_is_refused(tmp_path: Path) -> None:
    for name, message in [
        ("a.safetensors", "is not a safetensors"),
        ("a.ckpt", "is a pickle"),
        ("a.pt", "is a pickle"),
    ]:
        (tmp_path / name).write_bytes(b"rubbish")
        with pytest.raises(UsageError, match=message):
            load_teacher(str(tmp_path / name))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_is_refused_unless_allowed(tmp_path: Path, small_teacher: Path, part: str) -> None:
    folder = pickled(small_teacher, tmp_path / "teacher", part)
    with pytest.raises(UsageError, match=rf"{part} holds pickled weights only.*teacher\.allow_pickle=true"):
        load_teacher(str(folder))
    loaded = load_teacher(str(folder), allow_pickle=True)
    expected = load_teacher(str(small_teacher))
    assert loaded.fingerprint(with_network=True) == expected.fingerprint(with_network=True)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_are_hashed_again_only_when_they_were_written_to(
    small_teacher: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(str(small_teacher))
    before = teacher.fingerprint(with_network=True)
    assert load_teacher(str(small_teacher)).fingerprint(with_network=True) == before
    hashed = []
    monkeypatch.setattr(base.hashlib, "blake2b", lambda *a, **k: hashed.append(a) or blake2b(*a, **k))
    assert teacher.fingerprint(with_network=True) == before
    assert len(hashed) == 1  # what is not a weight
    module = teacher.pipeline.components[part]
    last = max(module.parameters(), key=Tensor.numel).detach().view(-1)[-1]
    kept = last.clone()
    last += 1
    assert teacher.fingerprint(with_network=True) != before
    assert len(hashed) == 2 + len(module.state_dict())
    last.copy_(kept)
    assert teacher.fingerprint(with_network=True) == before
    module.half()
    assert teacher.fingerprint(with_network=True) != before


def test_the_config_of_another_program_is_ignored(tmp_path: Path, small_teacher: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    (folder / "lora").mkdir()
    (folder / "config.toml").write_text('[model]\nname = "mine"\n')
    loaded = load_teacher(str(folder)).fingerprint(with_network=True)
    assert loaded == load_teacher(str(small_teacher)).fingerprint(with_network=True)
    assert dict(describe(str(folder)))["type"].startswith("StableDiffusionPipeline")


@pytest.mark.parametrize(
    ("installed", "name"),
    [("0.35.0", "torch_dtype"), ("0.39.2", "torch_dtype"), ("0.40.0", "dtype"), ("1.0.0", "dtype")],
)
def test_the_dtype_has_the_name_that_diffusers_expects(
    installed: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "version", lambda package: installed)
    assert compat.dtype_option(torch.float16) == {name: torch.float16}


def test_a_teacher_is_loaded_without_a_deprecation_of_its_dtype(
    small_teacher: Path, recwarn: pytest.WarningsRecorder
) -> None:
    load_teacher(str(small_teacher))
    assert [str(each.message) for each in recwarn if "torch_dtype" in str(each.message)] == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_an_incomplete_folder_is_refused_by_what_is_missing(tmp_path: Path, small_teacher: Path, part: str) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    shutil.rmtree(folder / part)
    with pytest.raises(UsageError, match=f"is incomplete: model_index.json names {part}"):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    "index", [None, b"{", b"\xff", b"[1]", b"{}", b'{"_class_name": "NoSuchPipeline"}', b'{"unet": []}']
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, small_teacher: Path, index: bytes | None) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    (folder / "model_index.json").unlink()
    if index is not None:
        (folder / "model_index.json").write_bytes(index)
    with pytest.raises(UsageError, match=r"teacher") as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "incomplete", "other", "no config"])
def test_damaged_weights_are_refused(tmp_path: Path, small_teacher: Path, part: str, damage: str) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    (weights,) = (folder / part).glob("*.safetensors")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    elif damage == "incomplete":
        tensors = load_file(weights)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "other":
        config = json.loads((folder / part / "config.json").read_text())
        key = "hidden_size" if part == "text_encoder" else "block_out_channels"
        config[key] = 32 if part == "text_encoder" else [64, 64]
        (folder / part / "config.json").write_text(json.dumps(config))
    else:
        (folder / part / "config.json").unlink()
    with pytest.raises(UsageError, match=r"(cannot be loaded as a diffusers pipeline|is incomplete): \S") as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value)


def test_another_pipeline_is_refused_by_its_class(tmp_path: Path, small_teacher: Path) -> None:
    folder = edited(
        small_teacher,
        tmp_path / "teacher",
        "model_index.json",
        lambda index: {**index, "_class_name": "StableDiffusionImg2ImgPipeline"},
    )
    with pytest.raises(
        UsageError, match="is a StableDiffusionImg2ImgPipeline, which cannot be distilled yet"
    ) as caught:
        load_teacher(str(folder))
    assert all(name in str(caught.value) for name in supported_classes())


def test_a_pipeline_of_a_class_that_diffusers_has_not_is_refused(tmp_path: Path, small_teacher: Path) -> None:
    folder = edited(
        small_teacher,
        tmp_path / "teacher",
        "model_index.json",
        lambda index: {**index, "_class_name": "NoSuchPipeline"},
    )
    with pytest.raises(UsageError, match="is a NoSuchPipeline, which the installed diffusers does not know"):
        load_teacher(str(folder))


def test_an_inpainting_u_net_in_a_plain_pipeline_is_refused(tmp_path: Path, small_teacher: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet: Any = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    unet.save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match="takes 9 channels, and a StableDiffusionPipeline gives it 4"):
        load_teacher(str(folder))
