"""The model card of a run: what it was distilled from and with, and how its files are used."""

from pathlib import Path

from lcmdistill.checkpoint import write_text
from lcmdistill.config import to_toml
from lcmdistill.settings import RunConfig
from lcmdistill.teachers import public_name, resolve_alias
from lcmdistill.teachers.base import Teacher

_FULL_USE = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}/pipeline")
image = pipeline("a prompt", num_inference_steps=4, guidance_scale={guidance:g}).images[0]
```

or `lcmdistill sample {folder} --steps 4 --prompt "a prompt"`. Guidance is an input of the network: images cost one forward a
step, and negative prompts have no effect."""

_LORA_USE = """ComfyUI and A1111: put `lora/{folder.name}.safetensors` among the LoRAs, weight 1, sampler LCM, 4 steps, CFG 1.
diffusers:

```python
from diffusers import DiffusionPipeline, LCMScheduler

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
pipeline.load_lora_weights("{folder}/lora", weight_name="{folder.name}.safetensors")
image = pipeline("a prompt", num_inference_steps=4, guidance_scale=1).images[0]
```

or `lcmdistill sample {folder} --steps 4 --prompt "a prompt"`. The guidance that it was trained with is in its weights: draw at
guidance scale 1, up to 2 at most."""


# How a file or folder on the hub is used, by the format that it was exported in.
_DRAWN = 'image = pipeline("a prompt", num_inference_steps=4, guidance_scale={guidance:g}).images[0]'
_LOADED = """from diffusers import DiffusionPipeline, LCMScheduler

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
"""
_IN_PYTHON = {
    "pipeline": f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{{place}}")
{_DRAWN}""",
    "kohya": f'{_LOADED}pipeline.load_lora_weights("{{place}}", weight_name="{{file}}")\n{_DRAWN}',
    "diffusers-lora": f'{_LOADED}pipeline.load_lora_weights("{{place}}")\n{_DRAWN}',
    "peft": f"""from peft import PeftModel
{_LOADED}pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "{{place}}")
{_DRAWN}""",
    "single-file": f"""from diffusers import LCMScheduler, StableDiffusionPipeline
from huggingface_hub import hf_hub_download

pipeline = StableDiffusionPipeline.from_single_file(hf_hub_download("{{place}}", "{{file}}"))
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
{_DRAWN}""",
    "onnx": f"""from optimum.onnxruntime import {{onnx_class}}

pipeline = {{onnx_class}}.from_pretrained("{{place}}")
{_DRAWN}""",
}
_ELSEWHERE = {
    "kohya": "ComfyUI, A1111: put `{file}` among the LoRAs, weight 1, sampler LCM, 4 steps, CFG 1.\n\n",
    "single-file": "ComfyUI, A1111: put `{file}` among the checkpoints, sampler LCM, 4 steps, CFG 1.\n\n",
}


def card_for(card: str, name: str, place: str, file: str, model: str, guidance: float | None) -> str:
    """A run's card with its Use section rewritten for one export.

    name: the format; place: the hub's repository or a folder; file: the file's name, if it is one; model: the teacher;
    guidance: what to draw with if the network takes omega, else None.
    """
    before, found, rest = card.partition("\n## Use\n")
    after = rest[rest.find("\n## Configuration\n") :]
    if not found or not after.startswith("\n"):  # not as it was written here: somebody's own
        return card
    values = {"place": place, "file": file, "model": model, "guidance": 1.0 if guidance is None else guidance}
    kind = "StableDiffusion" if guidance is None else "LatentConsistencyModel"
    code = _IN_PYTHON[name].format(**values, onnx_class=f"ORT{kind}Pipeline")
    return f"{before}{found}\n{_ELSEWHERE.get(name, '').format(**values)}```python\n{code}\n```\n{after}"


def model_card(config: RunConfig, folder: Path, teacher: Teacher, picture: str | None = None) -> str:
    """Markdown with the hub's metadata on top. Guidance is told in both conventions. picture: a validation grid."""
    from huggingface_hub import ModelCardData

    model, objective = resolve_alias(config.teacher.model), config.objective
    is_lora = config.student.kind == "lora"
    is_hub_id = model.count("/") == 1 and not Path(model).exists()
    tags = ["text-to-image", "stable-diffusion", "lcm", "latent-consistency-model", "lcmdistill"]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=model if is_hub_id else None,
        base_model_relation=("adapter" if is_lora else "finetune") if is_hub_id else None,
        tags=[*tags, "lora"] if is_lora else tags,
    )
    use = (_LORA_USE if is_lora else _FULL_USE).format(
        folder=folder, model=model, guidance=config.run.validation_guidance_scale
    )
    low, high = objective.w_min, objective.w_max
    omega = f"omega {low:g}" if low == high else f"omega drawn from {low:g} to {high:g}"
    scale = f"{low + 1:g}" if low == high else f"{low + 1:g} to {high + 1:g}"
    kind = f"An LCM-LoRA of rank {config.student.rank}, alpha {config.student.alpha:g}" if is_lora else "An LCM"
    return f"""---
{data.to_yaml()}
---

# {folder.name}: {config.teacher.model} in 1 to 8 steps

{kind} (Luo et al. 2023, arXiv:2310.04378), distilled from `{public_name(config.teacher.model)}` with lcmdistill. The
licence is the teacher's; see its own model card.

- {omega}, which is diffusers' `guidance_scale` {scale} (omega + 1)
- {config.optim.max_train_steps} optimiser steps, {objective.solver} solver, k = {objective.skip}, {config.data.resolution} px
- weights of the {"EMA" if config.student.target == "ema" else "live student"}; the teacher predicts {teacher.prediction_type}
{f"{chr(10)}![Validation grid]({picture}){chr(10)}" if picture else ""}
## Use

{use}

## Configuration

```toml
{to_toml(config).strip()}
```
"""


def write_run_card(config: RunConfig, folder: Path, teacher: Teacher) -> None:
    """The run's own README.md: the card, with the newest validation grid."""
    grids = sorted((folder / "samples").glob("step-*.png"))
    picture = f"samples/{grids[-1].name}" if grids else None
    write_text(folder / "README.md", model_card(config, folder, teacher, picture))
