"""Full-size files for other programs, with random weights and CLIP's real vocabulary, and jobs in ComfyUI's engine."""

import json
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from lcmdistill.export.single_file import write_single_file
from lcmdistill.teachers.lora.adapters import LoraLayer
from lcmdistill.teachers.lora.files import kohya_tensors
from lcmdistill.teachers.single_file.load import write_vocabulary
from tests.support.full_size import build_sd15

ROOT = Path(__file__).parent.parent.parent

PROMPT, SEED, SIDE = "a red heart on a table, oil painting", 7, 128

CLOSE = 2.0
"255ths that a pixel may differ by: fp16 files, and times that ComfyUI rounds"

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def build_base(folder: Path) -> Path:
    """Stable Diffusion 1.5 in full size, whose tokenizer is CLIP's."""
    build_sd15(folder)
    (folder / "tokenizer").rename(folder.parent / "letters")
    (folder.parent / "clip").mkdir()
    write_vocabulary(folder.parent / "clip")
    CLIPTokenizer.from_pretrained(folder.parent / "clip", model_max_length=77).save_pretrained(folder / "tokenizer")
    return folder


def opened_student(folder: Path, *, method: str, prediction_type: str = "epsilon", zero_snr: bool = False) -> Any:
    """The base as a student of "lcm" or "pcm", in fp32."""
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    options = {**BETAS, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr, "steps_offset": 1}
    if method == "pcm":
        options |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipeline.scheduler = (DDIMScheduler if method == "pcm" else LCMScheduler)(**options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_file(pipeline: Any, path: Path) -> Path:
    """A checkpoint in fp16, as exports are by default."""
    write_single_file(pipeline, path, dtype=torch.float16)
    return path


def write_lora(pipeline: Any, path: Path, rank: int = 4) -> Path:
    """A kohya LoRA on all layers that lcmdistill trains, in fp32; weak enough for a network that was not trained."""
    from lcmdistill.config.schema import LORA_MODULES

    generator, layers = torch.Generator().manual_seed(1), {}
    for name, module in pipeline.unet.named_modules():
        if any(name.endswith(end) for end in LORA_MODULES) and hasattr(module, "weight"):
            shape, conv = module.weight.shape, [1] * (module.weight.ndim - 2)
            down = torch.randn(rank, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5
            up = 0.3 * torch.randn(shape[0], rank, *conv, generator=generator)
            layers[name] = LoraLayer(down, up, rank / 2)
    save_file(kohya_tensors(layers, torch.float32), path)
    return path


def noise(channels: int = 4, side: int = SIDE // 8) -> Tensor:
    """The noise that both programs start from with the same seed on a CPU."""
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(SEED))


def in_comfyui(python: str, checkout: str, folder: Path, **job: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a job; see tests/slow/clients/comfyui_driver.py."""
    folder.mkdir(parents=True, exist_ok=True)
    if "noise" not in job:
        save_file({"noise": noise()}, folder / "noise.safetensors")
    job = {"prompt": PROMPT, "negative": "", "noise": str(folder / "noise.safetensors"), "cfg": 1.0, **job}
    job["output"] = str(folder / "out.safetensors")
    (folder / "job.json").write_text(json.dumps(job))
    driver = ROOT / "tests" / "slow" / "clients" / "comfyui_driver.py"
    words = [python, str(driver), checkout, str(folder / "job.json")]
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return load_file(job["output"]), json.loads((folder / "out.json").read_text())


def pixels(images: Tensor) -> Tensor:
    """ComfyUI's images, (B, H, W, 3) in [0, 1], in 255ths."""
    return (images.clamp(0, 1) * 255).round()
