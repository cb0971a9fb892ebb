"""Exports of PCM runs: ComfyUI's engine generates with plain samplers what `lcmdistill sample` generates, on the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.export.registry import export
from lcmdistill.sampling.generate import find_model, generate, load_student
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.pipelines import network_of
from tests.support.clients import CLOSE, PROMPT, SEED, SIDE, in_comfyui, noise, opened_student, pixels, write_file
from tests.support.finished_runs import finished_run
from tests.support.models import build_sd3

pytestmark = pytest.mark.slow

STEPS = 4

SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
"of the published VAE: ComfyUI assumes them for every file"

PCM: dict[str, Any] = {"objective__name": "pcm", "objective__phases": str(STEPS), "data__resolution": SIDE}


def sampled(run: Path, size: int = SIDE) -> tuple[Any, Tensor]:
    """The pipeline of a run, and the image that `lcmdistill sample` writes, (H, W, 3) in 255ths."""
    model = find_model(str(run))
    pipeline = load_student(
        model.path, torch.device("cpu"), model.loras, options=model.options, scheduler=model.scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    scale = 4.0 if has_omega_input(network_of(pipeline)) else 1.0
    (generated,) = generate(pipeline, [PROMPT], [SEED], steps=STEPS, guidance_scale=scale, size=size)
    image = torch.from_numpy(np.asarray(generated.image, dtype=np.float32))
    assert image.std() > 5  # it shows something
    return pipeline, image


def largest_difference(image: Tensor, images: Tensor) -> float:
    return float((pixels(images)[0] - image).abs().max())


def test_a_pcm_single_file(base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    run = finished_run(base, "full", tmp_path / "run", **PCM)
    file = tmp_path / "pcm.safetensors"
    sentence = export(run, "single-file", file, dtype="fp16", guidance_scale=None, verify=True)
    assert "KSampler: sampler euler, scheduler sgm_uniform, 4 steps, CFG 1" in sentence
    _, image = sampled(run)
    for sampler in ("euler", "ddim"):
        job = {"checkpoint": str(file), "sampler": sampler, "scheduler": "sgm_uniform", "steps": STEPS}
        tensors, _ = in_comfyui(clients_python, comfyui, tmp_path / sampler, **job)
        value = largest_difference(image, tensors["images"])
        print("single-file", sampler, value)
        assert value <= CLOSE


def test_a_pcm_lora(base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    run = finished_run(base, "lora", tmp_path / "run", **PCM)
    checkpoint = write_file(opened_student(base, method="pcm"), tmp_path / "base.safetensors")
    file = tmp_path / "pcm.safetensors"
    sentence = export(run, "kohya", file, dtype="fp16", guidance_scale=None, verify=True)
    assert "KSampler: sampler euler, scheduler sgm_uniform, 4 steps, CFG 1" in sentence
    _, image = sampled(run)
    for sampler in ("euler", "ddim"):
        job = {"checkpoint": str(checkpoint), "lora": str(file), "sampler": sampler, "scheduler": "sgm_uniform"}
        tensors, facts = in_comfyui(clients_python, comfyui, tmp_path / sampler, steps=STEPS, **job)
        assert facts["lora_modules"] == 278
        value = largest_difference(image, tensors["images"])
        print("kohya", sampler, value)
        assert value <= CLOSE


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_of_stable_diffusion_3_s_shape(kind: str, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    """As many heads as blocks, of 64 channels, as ComfyUI expects. Its text encoders have one size: embeddings are passed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"attention_head_dim": 64, "num_attention_heads": 3, "caption_projection_dim": 192}
        teacher = build_sd3(tmp_path / "sd3" / "model", has_t5=False, **shape)
    run = finished_run(teacher, kind, tmp_path / "run", **PCM)
    pipeline, image = sampled(run, 16)
    files = {"checkpoint": tmp_path / "student.safetensors"}
    if kind == "lora":
        files = {"checkpoint": tmp_path / "base.safetensors", "lora": run / "lora" / "run.safetensors"}
        write_file(load_teacher(str(teacher)).pipeline, files["checkpoint"])
    else:
        export(run, "single-file", files["checkpoint"], dtype="fp16", guidance_scale=None, verify=True)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None, "cpu", 1, False)
    save_file({"prompt_embeds": embeds.contiguous(), "pooled": pooled.contiguous()}, tmp_path / "text.safetensors")
    save_file({"noise": noise(16, 16 // pipeline.vae_scale_factor)}, tmp_path / "noise.safetensors")
    job = {name: str(tmp_path / f"{file}.safetensors") for name, file in (("embeddings", "text"), ("noise", "noise"))}
    job |= {name: str(path) for name, path in files.items()}
    job |= {"sampler": "euler", "scheduler": "simple"}
    tensors, facts = in_comfyui(clients_python, comfyui, tmp_path / "job", steps=STEPS, **job)
    assert facts["class"] == "SD3"
    vae = pipeline.vae.config
    latents = (tensors["latents"] - SD3_SHIFT) * SD3_SCALE  # as the network made them
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / vae.scaling_factor + vae.shift_factor)[0] / 2 + 0.5
    value = largest_difference(image, decoded.permute(0, 2, 3, 1))
    print("sd3", kind, value, facts)
    assert value <= CLOSE
