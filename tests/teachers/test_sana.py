"""SANA: prompts, latents and time as in its pipeline, and files that diffusers reads."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.parameterization import FLOW
from lcmdistill.students.lora_files import family_of_lora
from lcmdistill.teachers.base import make_teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.teachers.sana import call_sana
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import lora_file
from tests.support.models import build_sana
from tests.support.teachers import SMALL, Command

library: Any = diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model under the published scheduler."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_sana(tmp_path_factory.mktemp("sana") / "model")


def test_a_solver_with_flow_sigmas_is_a_flow_schedule(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    assert (teacher.schedule, teacher.prediction_type) == (FlowSchedule(1000, 3.0), FLOW)
    assert type(teacher.pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    solver = library.SanaPipeline.from_pretrained(folder).scheduler
    solver.set_timesteps(10)
    grid = FlowSchedule(1000, 3.0).grid(11).flip(0)[:-1]
    torch.testing.assert_close(solver.timesteps.float(), grid, rtol=0, atol=2.0)  # whole numbers, which start at .999


def test_prompts_follow_the_instruction_except_the_empty_one(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    handed: list[Any] = []
    forward = teacher.network.forward
    teacher.network.forward = lambda *args, **kwargs: handed.append(kwargs) or forward(*args, **kwargs)
    noise = torch.randn(1, 8, 8, 8)
    teacher.generate_latents(["a cat"], noise, steps=1, guidance_scale=2.0, scheduler="DDIMScheduler")
    found = teacher.encode_prompts(["", "a cat", ""])
    torch.testing.assert_close(found["prompt_embeds"][:2], handed[0]["encoder_hidden_states"])
    assert torch.equal(found["attention_mask"][:2], handed[0]["encoder_attention_mask"])
    assert torch.equal(found["prompt_embeds"][0], found["prompt_embeds"][2])
    assert found["attention_mask"].sum(1).tolist() == [
        1,
        7,
        1,
    ]  # <bos>; and the instruction's last token and the prompt
    assert handed[0]["timestep"].tolist() == [500.0, 500.0]  # scaled
    assert token_limit(teacher.pipeline) == 300
    assert count_truncated(teacher.pipeline, ["a cat", "a" * 400]) == 1


def test_latents_are_scaled_like_in_the_pipeline(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = teacher.encode_images(pixels)
    with torch.no_grad():
        raw = teacher.pipeline.vae.encode(pixels).latent
        decoded = teacher.pipeline.vae.decode(raw).sample
    assert (teacher.vae_factor, mean.shape, bool(std.any())) == (4, (1, 8, 8, 8), False)
    torch.testing.assert_close(mean, raw * 0.4)
    torch.testing.assert_close(teacher.decode(mean), (decoded / 2 + 0.5).clamp(0, 1))


def test_its_pipeline_takes_multiples_of_32_px(folder: Path) -> None:
    assert load_teacher(str(folder)).multiple == 32  # of its VAE and patches alone: 4


def test_options_of_the_vae(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="AutoencoderDC, and only an AutoencoderKL can be replaced; remove --vae"):
        load_teacher(str(folder), vae=str(tmp_path))
    plain, tiled = load_teacher(str(folder)), load_teacher(str(folder), vae_tiling=True)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(tiled.encode_images(pixels)[0], plain.encode_images(pixels)[0])
    assert tiled.pipeline.vae.use_tiling


def test_a_learned_variance_is_not_used_and_a_distilled_sana_is_refused(folder: Path) -> None:
    pipeline = library.SanaPipeline.from_pretrained(folder)
    config = dict(pipeline.transformer.config)
    wide = library.SanaTransformer2DModel.from_config({**config, "out_channels": 16})
    z, t = torch.randn(1, 8, 8, 8), torch.tensor([800.0])
    c = {"prompt_embeds": torch.randn(1, 5, 16), "attention_mask": torch.ones(1, 5)}
    with torch.no_grad():
        both = wide(z, c["prompt_embeds"], t * 0.5, encoder_attention_mask=c["attention_mask"], return_dict=False)[0]
        torch.testing.assert_close(call_sana(wide, z, t, c, None), both[:, :8])
    pipeline.transformer = library.SanaTransformer2DModel.from_config({**config, "guidance_embeds": True})
    with pytest.raises(UsageError, match=r"guidance input .* distilled already, as SANA-Sprint"):
        make_teacher(FAMILIES["sana"], pipeline)
    pipeline.transformer = library.SanaTransformer2DModel.from_config({**config, "in_channels": 4})
    with pytest.raises(UsageError, match="takes 4 channels and returns 8, and its VAE has 8"):
        make_teacher(FAMILIES["sana"], pipeline)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_pcm_run_is_read_by_diffusers(
    kind: str, folder: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 2}
    own = {key: value for key, value in own.items() if not key.startswith("objective.w")} | {"objective.phases": "2"}
    sets = [f"--set={key}={value}" for key, value in own.items()]
    base = ["distill-lora" if kind == "lora" else "distill", "--teacher", folder, "--data", image_folder]
    base += ["--objective", "pcm", "--output", "run", *(["--set=student.rank=2"] if kind == "lora" else [])]
    code, output, error = command(*base, *sets)
    assert (code, "velocity-predicting transformer" in output) == (0, True), error
    code, _, error = command("sample", "run", "--steps", 2, "--prompt", "a cat", "--output", "s")
    assert code == 0, error
    if kind == "full":
        pipeline = library.SanaPipeline.from_pretrained("run/pipeline")
        assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        assert pipeline.scheduler.config.shift == 3.0
        assert pipeline.transformer.config.sample_size == 32  # the pipeline accepts certain sizes only
        size: dict[str, Any] = {"height": 32, "width": 32, "use_resolution_binning": False}
        latents = pipeline("a cat", num_inference_steps=2, guidance_scale=1.0, output_type="latent", **size)
        assert latents.images.isfinite().all()
        return
    file = lora_file(tmp_path / "run")
    assert family_of_lora(file.parent).key == "sana"
    assert all(key.startswith("transformer.transformer_blocks.") for key in load_file(file))
    code = (tmp_path / "run" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    values: dict[str, Any] = {}
    exec(code.replace('"model"', repr(str(folder))), values)  # the card of a local teacher hides where it is
    assert values["pipeline"].scheduler.config.shift == 3.0  # flow_shift of the teacher's solver
    assert values["image"].size == (32, 32)  # and not brought to it from one of the pipeline's own sizes
    assert "use_resolution_binning=False" in code
    pipeline = library.SanaPipeline.from_pretrained(folder)
    inputs = torch.randn(1, 8, 8, 8), torch.randn(1, 5, 16), torch.tensor([500.0])
    with torch.no_grad():
        before = pipeline.transformer(*inputs, return_dict=False)[0]
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        after = pipeline.transformer(*inputs, return_dict=False)[0]
    assert (after - before).abs().max() > 0


def test_the_full_size_transformer_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = library.SanaTransformer2DModel()
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(1.6, abs=0.01)
