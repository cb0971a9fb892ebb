"""FLUX.1: guidance as an input, packed latents, a shift by image size, LoRAs only, as in its pipeline."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.config.resolve import resolve
from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.parameterization import FLOW
from lcmdistill.diffusion.types import Conditioning, TeacherNetwork
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.report.info import describe
from lcmdistill.sampling.generate import default_guidance_scale
from lcmdistill.students.lora import check_layers
from lcmdistill.students.lora_files import family_of_lora
from lcmdistill.teachers.base import Teacher, make_teacher
from lcmdistill.teachers.flux import FLUX_1, call_flux, pack, unpack
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.lora.files import load_lora
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.training.memory.estimate import step_memory
from lcmdistill.training.preflight import validate_for_teacher
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import lora_file
from tests.support.models import build_flux
from tests.support.teachers import SMALL, Command

library: Any = diffusers

PROMPTS = ["a cat", "a dog in the rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a guidance input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_flux(tmp_path_factory.mktemp("flux") / "model")


def configured(teacher: Teacher, **settings: Any) -> Any:
    """The configuration of a LoRA run, {"section__key": value}, with what the teacher decides."""
    flags = {"student.kind": "lora", "teacher.model": "a/b", "student.rank": 4, "data.max_samples": 4}
    flags |= {key.replace("__", "."): value for key, value in settings.items()}
    return resolve_run_defaults(resolve({}, flags, objectives=OBJECTIVES), 1, teacher)


def test_tokens_are_packed_like_in_the_pipeline() -> None:
    latents = torch.randn(2, 16, 6, 10)
    tokens = library.FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 6, 10), latents)


def test_the_network_is_called_like_the_pipeline_calls_it(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    handed: list[tuple[dict[str, Any], torch.Tensor]] = []
    forward = teacher.network.forward

    def recorded(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        handed.append((kwargs, output[0]))
        return output

    teacher.network.forward = recorded
    noise = torch.randn(2, 16, 6, 10)
    teacher.generate_latents(PROMPTS, noise, steps=2, guidance_scale=4.0, scheduler="DDIMScheduler")
    cond = teacher.encode_prompts(PROMPTS)
    assert cond["prompt_embeds"].shape == (2, 512, 24)
    teacher.network.forward = forward
    for kwargs, output in handed:
        z, t = unpack(kwargs["hidden_states"], 6, 10), kwargs["timestep"] * 1000
        with torch.no_grad():
            found = call_flux(teacher.network, z, t, cond.values, None, guidance=4.0)
            other = call_flux(teacher.network, z, t, cond.values, None)
        torch.testing.assert_close(found, unpack(output, 6, 10), rtol=1e-4, atol=1e-5)
        assert (found - other).abs().max() > 1e-4


@pytest.mark.parametrize("resolution", [64, 256])
def test_samples_equal_those_of_the_pipeline(resolution: int, folder: Path) -> None:
    """Euler's method on the schedule and the network of a run, without classifier-free guidance."""
    teacher = load_teacher(str(folder))
    config = configured(teacher, data__resolution=resolution, objective__w_min=3.0, objective__w_max=3.0)
    teacher = teacher.in_run(config)
    noise = torch.randn(1, 16, resolution // 4, resolution // 4)
    options: Any = {"steps": 3, "guidance_scale": 4.0, "scheduler": "DDIMScheduler"}
    expected = teacher.generate_latents(["a cat"], noise, **options)
    cond, z = teacher.encode_prompts(["a cat"]), noise
    times = teacher.schedule.grid(4).flip(0)
    for t, s in pairwise(times):
        with torch.no_grad():
            v = teacher.call(teacher.network, z, t[None], cond.values, None)
        z = z + (s - t) / 1000 * v
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_the_shift_follows_the_resolution_of_the_run(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    native = FlowSchedule(1000, math.exp(1.15))
    assert (teacher.schedule, teacher.prediction_type, teacher.multiple) == (native, FLOW, 8)
    shifts = {}
    for resolution in (128, 512):  # 256 and 4096 tokens of 8 px
        schedule: Any = teacher.in_run(configured(teacher, data__resolution=resolution)).schedule
        shifts[resolution] = schedule.shift
        config = teacher.pipeline.scheduler.config
        for name in ("LCMScheduler", "DDIMScheduler"):
            scheduler = FLUX_1.student_scheduler(schedule, config, name, {})
            mu = 0.5 + 0.65 * ((resolution / 8) ** 2 - 256) / (4096 - 256)
            scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)  # as the pipeline does
            torch.testing.assert_close(scheduler.timesteps, schedule.grid(5).flip(0)[:-1], rtol=1e-5, atol=1e-3)
    assert shifts == pytest.approx({128: math.exp(0.5), 512: math.exp(1.15)})


def test_prompts_are_as_long_as_the_t5_reads(folder: Path) -> None:
    pipeline = load_teacher(str(folder)).pipeline
    assert token_limit(pipeline) == 512
    assert count_truncated(pipeline, ["a cat", "a" * 600]) == 1


def test_models_without_a_guidance_input_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no guidance input .* few-step model already, as FLUX.1 \[schnell\]"):
        load_teacher(str(build_flux(tmp_path / "schnell", guidance_embeds=False)))
    pipeline = library.FluxPipeline.from_pretrained(folder)
    pipeline.transformer = library.FluxTransformer2DModel.from_config(
        {**pipeline.transformer.config, "in_channels": 32}
    )
    with pytest.raises(
        UsageError, match="takes 32 channels and returns 32, and its VAE has 16, which are 64 per token"
    ):
        make_teacher(FLUX_1, pipeline)


def test_a_run_takes_the_published_guidance_and_resolution(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    for name in ("lcm", "tcd", "pcm", "tdm"):
        config = configured(teacher, objective__name=name)
        assert (config.objective.w_min, config.objective.w_max) == (2.5, 2.5)
        assert (config.run.validation_guidance_scale, config.data.guidance_scale) == (3.5, 3.5)
        assert config.data.resolution == 1024
    config = configured(teacher, objective__w_min=9.0, objective__w_max=9.0)
    assert config.run.validation_guidance_scale == 10.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student__kind": "full"}, "a full student of FLUX.1 is not supported, .* use lcmdistill distill-lora"),
        ({"objective__guidance": "free"}, "--guidance free trains for classifier-free guidance, and FLUX.1 takes"),
        ({"objective__name": "cd"}, "--objective cd has no setting for guidance, .* use lcm, tcd, pcm or tdm"),
        (
            {"objective__w_min": 1.0, "objective__w_max": 3.0},
            "the guidance scale is 2 to 4, and FLUX.1 takes one fixed",
        ),
        ({"data__teacher_cache_samples": 1}, "caches outputs for classifier-free guidance, which FLUX.1 does not have"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    teacher = load_teacher(str(folder))
    with pytest.raises(UsageError, match=message):
        validate_for_teacher(configured(teacher, **settings), teacher)


def test_a_lora_on_its_base_is_sampled_at_the_guidance_that_is_its_input(folder: Path) -> None:
    assert default_guidance_scale(load_teacher(str(folder)).pipeline, has_loras=True) == 3.5


def test_the_empty_prompt_is_not_evaluated() -> None:
    seen: list[int] = []

    def network(z: Any, t: Any, c: Any, w: Any) -> Any:
        seen.append(len(z))
        return z, z

    teacher = TeacherNetwork(network, Conditioning({}), applies_cfg=False)
    z, t, cond = torch.randn(3, 1, 1, 1), torch.ones(3), Conditioning({})
    teacher.denoiser(cond, torch.full((3,), 2.5))(z, t)
    real, null = teacher.with_and_without_prompt(z, t, cond)
    assert seen == [3, 3]
    assert real is null


def test_a_lora_file_is_read_by_diffusers_and_has_the_keys_of_comfyui(
    folder: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 1, "student.rank": 2}
    own = {key: value for key, value in own.items() if not key.startswith("objective.w")} | {"student.alpha": 5.0}
    own |= {"objective.phases": "2"}
    sets = [f"--set={key}={value}" for key, value in own.items()]
    base = ["distill-lora", "--teacher", folder, "--data", image_folder, "--objective", "pcm", "--output", "run"]
    code, output, error = command(*base, *sets)
    assert code == 0, error
    file = lora_file(tmp_path / "run")
    assert family_of_lora(file.parent).key == "flux"
    tensors = load_file(file)
    layers = {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in tensors}
    assert len(layers) == 2 * 12 + 2 * 4
    assert {"transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.1.proj_mlp"} <= layers
    pipeline = library.FluxPipeline.from_pretrained(folder)
    z, t = torch.randn(1, 16, 8, 8), torch.tensor([500.0])
    cond = {"prompt_embeds": torch.randn(1, 12, 24), "pooled": torch.randn(1, 16)}
    weight = {name: module.weight.clone() for name, module in pipeline.transformer.named_modules() if name in layers}
    with torch.no_grad():
        before = call_flux(pipeline.transformer, z, t, cond, None)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        after = call_flux(pipeline.transformer, z, t, cond, None)
        pipeline.unload_lora_weights()
        for name, module in pipeline.transformer.named_modules():
            if name in layers:  # by ComfyUI's rule for keys without alpha: up @ down
                up, down = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "BA")
                module.weight.copy_(weight[name] + up @ down)
        merged = call_flux(pipeline.transformer, z, t, cond, None)
    torch.testing.assert_close(after, merged, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0
    setup = "CFG 1; node FluxGuidance set to 3.5; node ModelSamplingFlux set to the image's width and height"
    assert setup in " ".join(output.split())
    code, out, error = command("sample", "run", "--steps", 2, "--prompt", "a cat", "--output", "s")
    assert (code, error) == (0, "")
    assert "guidance scale 3.5" in out
    code, _, error = command("sample", "run", "--prompt", "a cat", "--negative-prompt", "a dog")
    assert (code, "whose guidance is an input of the network; remove this option" in error) == (2, True)
    code, out, _ = command("info", "run")
    assert "guidance_scale 3.5" in out
    rows = dict(describe(str(file)))
    assert (rows["fits"], rows["alpha"]) == ("FLUX.1", "2.0")  # which is the rank: alpha 5 is in the weights
    for form, others in (
        ("single-file", "diffusers-lora, peft or fused"),
        ("kohya", "--format diffusers-lora, or fused"),
    ):
        code, _, error = command("export", "run", "--format", form, "--output", "e.safetensors")
        assert (code, f"{form} is not available for FLUX.1; use {others}" in error) == (2, True), error


def test_a_lora_under_the_original_names_of_layers_is_named_as_such(folder: Path, tmp_path: Path) -> None:
    """As kohya writes them for FLUX.1."""
    layer, file = "lora_unet_double_blocks_0_img_attn_qkv", tmp_path / "style.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(96, 2)}, file)
    with pytest.raises(UsageError, match=f"original layer names, such as {layer}.*; use a file with diffusers' keys"):
        load_lora(load_teacher(str(folder)).pipeline, str(file), "style")
    assert "cannot be used here (a transformer's original layer names)" in dict(describe(str(file)))["use"]


def test_memory_is_estimated_with_a_quantized_base(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    plain, quantized = (
        step_memory(configured(teacher, data__resolution=32, student__quantize_base=kind), teacher, torch.bfloat16)
        for kind in ("none", "int8")
    )
    count = sum(p.numel() for p in teacher.network.parameters())
    assert (plain.base, plain.critic) == (count, 0)
    assert 2 * count <= plain.frozen < 2.2 * count
    assert quantized.frozen < 0.7 * plain.frozen


def test_the_full_size_transformer_has_the_published_number_of_parameters_and_lora_layers() -> None:
    with torch.device("meta"):
        network = library.FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(11.90, abs=0.01)
    config = resolve({}, {"student.target_modules": FLUX_1.lora_modules}, objectives=OBJECTIVES).student
    check_layers(network, config)
    names = [name for name, _ in network.named_modules() if name.endswith(tuple(f".{m}" for m in FLUX_1.lora_modules))]
    assert len(names) == 19 * 12 + 38 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scheduler", "more"),
    [
        ("lcm", "FlowMatchLCMScheduler", {"data.buckets": '["32x32", "32x48"]'}),
        ("tcd", "FlowMatchEulerDiscreteScheduler", {"data.sources": "teacher", "data.teacher_steps": 2}),
        ("tdm", "FlowMatchEulerDiscreteScheduler", {"objective.segments": 2}),
    ],
)
def test_runs_of_other_methods_are_evaluated_and_fused(
    method: str,
    scheduler: str,
    more: dict[str, Any],
    folder: Path,
    image_folder: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 2, "student.rank": 2}
    own = {key: value for key, value in own.items() if not key.startswith("objective.w")} | more
    sets = [f"--set={key}={value}" for key, value in own.items() if key != "data.sources"]
    data = [] if method == "tdm" else ["--data", own.get("data.sources", image_folder)]
    base = ["distill-lora", "--teacher", folder, *data, "--objective", method, "--output", "run"]
    code, _, error = command(*base, *sets)
    assert code == 0, error
    code, _, error = command("evaluate", "run", "--steps", 2, "--num-images", 2)
    assert code == 0, error
    code, _, error = command("export", "run", "--format", "fused", "--output", "fused", "--dtype", "fp32")
    assert code == 0, error
    pipeline = library.FluxPipeline.from_pretrained("fused")
    assert type(pipeline.scheduler).__name__ == scheduler
    assert pipeline.scheduler.config.use_dynamic_shifting
    options = {"height": 32, "width": 32, "sigmas": [1.0, 0.5], "output_type": "latent"}
    assert pipeline("a cat", guidance_scale=3.5, **options).images.isfinite().all()
