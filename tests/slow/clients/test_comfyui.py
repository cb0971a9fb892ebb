"""ComfyUI's engine generates from full-size files the images that lcmdistill generates, on the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcmdistill.export.client_sampling import comfyui_sigmas, sgm_uniform
from lcmdistill.export.single_file import write_single_file
from lcmdistill.sampling.generate import generate
from lcmdistill.teachers.lora.files import load_lora
from tests.support.clients import CLOSE, PROMPT, SEED, SIDE, in_comfyui, opened_student, pixels, write_file, write_lora

pytestmark = pytest.mark.slow


def image_of(pipeline: Any, steps: int) -> Tensor:
    """The image that `lcmdistill sample` writes, (H, W, 3) in 255ths."""
    (generated,) = generate(pipeline, [PROMPT], [SEED], steps=steps, guidance_scale=1.0, size=SIDE)
    return torch.from_numpy(np.asarray(generated.image, dtype=np.float32))


def off(pipeline: Any, steps: int, images: Tensor) -> float:
    expected = image_of(pipeline, steps)
    assert expected.std() > 5  # it shows something
    return float((pixels(images)[0] - expected).abs().max())


def test_one_step_of_an_lcm_student(base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    pipeline = opened_student(base, method="lcm")
    file = str(write_file(pipeline, tmp_path / "lcm.safetensors"))
    job = {"checkpoint": file, "sampler": "lcm", "scheduler": "sgm_uniform", "steps": 1}
    tensors, facts = in_comfyui(clients_python, comfyui, tmp_path / "job", **job)
    assert (facts["class"], facts["detected"]) == ("SD15", ["epsilon", False])
    assert off(pipeline, 1, tensors["images"]) <= CLOSE
    torch.testing.assert_close(tensors["sigmas"], comfyui_sigmas(), rtol=1e-5, atol=0)


def test_a_vae_of_another_scale(base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    pipeline = opened_student(base, method="lcm")
    with_family_s = image_of(pipeline, 1)
    pipeline.vae.register_to_config(scaling_factor=0.5)
    assert (image_of(pipeline, 1) - with_family_s).abs().max() > 5 * CLOSE
    file = tmp_path / "lcm.safetensors"
    write_single_file(
        pipeline, file, dtype=torch.float32
    )  # the base's weights are exact in fp16, and rescaled ones are not
    job = {"checkpoint": str(file), "sampler": "lcm", "scheduler": "sgm_uniform", "steps": 1}
    tensors, _ = in_comfyui(clients_python, comfyui, tmp_path / "job", **job)
    value = off(pipeline, 1, tensors["images"])
    print("another scale", value)
    assert value <= CLOSE


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("steps", [2, 4])
def test_a_pcm_student(steps: int, sampler: str, base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    pipeline = opened_student(base, method="pcm")
    file = str(write_file(pipeline, tmp_path / "pcm.safetensors"))
    job = {"checkpoint": file, "sampler": sampler, "scheduler": "sgm_uniform", "steps": steps}
    tensors, _ = in_comfyui(clients_python, comfyui, tmp_path / "job", **job)
    assert off(pipeline, steps, tensors["images"]) <= CLOSE
    torch.testing.assert_close(tensors["steps"], sgm_uniform(comfyui_sigmas(), steps), rtol=1e-5, atol=0)


def test_a_pcm_lora(base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    pipeline = opened_student(base, method="pcm")
    file = str(write_file(pipeline, tmp_path / "base.safetensors"))
    before = image_of(pipeline, 4)
    lora = str(write_lora(pipeline, tmp_path / "lora.safetensors"))
    load_lora(pipeline, lora, "it")
    job = {"checkpoint": file, "lora": lora, "sampler": "euler", "scheduler": "sgm_uniform", "steps": 4}
    tensors, facts = in_comfyui(clients_python, comfyui, tmp_path / "job", **job)
    assert facts["lora_modules"] == 278
    assert off(pipeline, 4, tensors["images"]) <= CLOSE
    assert (image_of(pipeline, 4) - before).abs().max() > 10 * CLOSE


def test_a_v_prediction_student_with_zero_snr(base: Path, comfyui: str, clients_python: str, tmp_path: Path) -> None:
    pipeline = opened_student(base, method="lcm", prediction_type="v_prediction", zero_snr=True)
    file = str(write_file(pipeline, tmp_path / "v.safetensors"))
    job = {"checkpoint": file, "sampler": "lcm", "scheduler": "sgm_uniform", "steps": 1}
    node = {"sampling": "v_prediction", "zsnr": True}
    tensors, facts = in_comfyui(clients_python, comfyui, tmp_path / "with", node=node, **job)
    assert facts["detected"] == ["epsilon", False]  # hence the node
    assert off(pipeline, 1, tensors["images"]) <= CLOSE
    torch.testing.assert_close(tensors["sigmas"], comfyui_sigmas(zero_snr=True), rtol=1e-4, atol=0)
    tensors, _ = in_comfyui(clients_python, comfyui, tmp_path / "without", **job)
    assert off(pipeline, 1, tensors["images"]) > 10 * CLOSE
