"""How a run's files are used in diffusers, ComfyUI, A1111 and on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.teachers import resolve_alias

_UI_SAMPLER = "sampler LCM, {steps} steps, CFG 1"


def uses(run: Path, config: Mapping[str, Any], steps: int) -> list[dict[str, Any]]:
    """A card each: name, lines of text, and code where there is some. steps: how many are recommended."""
    sampler = _UI_SAMPLER.format(steps=steps)
    command = {
        "name": "Command line",
        "lines": ["PNGs with their settings inside, and a grid."],
        "code": f'lcmdistill sample {run} --steps {steps} --prompt "a prompt"',
    }
    if config.get("student.kind") == "lora":
        file = f"{run.name}.safetensors"
        return [
            {
                "name": "diffusers",
                "lines": ["Put the LoRA on the checkpoint that it was trained on; its guidance is in its weights."],
                "code": _DIFFUSERS_LORA.format(
                    model=resolve_alias(config["teacher.model"]), run=run, file=file, steps=steps
                ),
            },
            {
                "name": "ComfyUI",
                "lines": [
                    f"Copy lora/{file} to models/loras.",
                    f"Load checkpoint, Load LoRA at strength 1, ModelSamplingDiscrete set to lcm; KSampler: {sampler}.",
                ],
                "code": None,
            },
            {
                "name": "A1111",
                "lines": [
                    f"Copy lora/{file} to models/Lora.",
                    f"Write <lora:{run.name}:1> into the prompt; {sampler}.",
                ],
                "code": None,
            },
            command,
        ]
    export = f"lcmdistill export {run} --format single-file --output {run.name}.safetensors"
    return [
        {
            "name": "diffusers",
            "lines": ["Guidance is an input of the network and costs nothing; negative prompts have no effect."],
            "code": _DIFFUSERS_FULL.format(run=run, steps=steps, guidance=config["run.validation_guidance_scale"]),
        },
        {
            "name": "ComfyUI",
            "lines": [
                "Write a single file, with the guidance baked in, and copy it to models/checkpoints:",
                f"Load checkpoint, then ModelSamplingDiscrete set to lcm; KSampler: {sampler}.",
            ],
            "code": export,
        },
        {
            "name": "A1111",
            "lines": ["The same single file, in models/Stable-diffusion.", f"Settings: {sampler}."],
            "code": export,
        },
        command,
    ]


_DIFFUSERS_FULL = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{run}/pipeline")
image = pipeline(
    "a prompt", num_inference_steps={steps}, guidance_scale={guidance:g}
).images[0]"""

_DIFFUSERS_LORA = """from diffusers import DiffusionPipeline, LCMScheduler

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
pipeline.load_lora_weights("{run}/lora", weight_name="{file}")
image = pipeline(
    "a prompt", num_inference_steps={steps}, guidance_scale=1
).images[0]"""
