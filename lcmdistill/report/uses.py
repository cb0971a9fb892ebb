"""How a run's files are used in diffusers, ComfyUI, A1111 and on the command line."""

from pathlib import Path
from shlex import quote
from typing import Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.teachers.naming import loading_code
from lcmdistill.teachers.single_file.inspect import read_header


def _class_of(lora: Path) -> str:
    """The class of the pipeline that a LoRA's file is for, by its header."""
    if not lora.is_file():
        return "StableDiffusionPipeline"
    is_xl = read_header(lora).metadata.get("ss_base_model_version", "").startswith("sdxl")
    return "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"


def uses(run: Path, config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """A card each: name, lines of text, and code where there is some. steps: how many are recommended."""
    method, free = config.objective.info, omega_range(config) is None
    guidance = config.run.validation_guidance_scale or 1.0
    settings = f"{steps} steps, CFG {guidance if free else 1:g}"
    sampler, comfy = (
        f"sampler {method.sampler}, {settings}",
        f"ModelSamplingDiscrete set to lcm; KSampler: sampler LCM, {settings}",
    )
    eta = method.sampling_options.get("eta")
    if eta is not None:  # which with eta 1 is the LCM sampler
        sampler = f"sampler TCD with eta {eta:g}, or LCM where there is no TCD, {settings}"
        comfy += f". For TCD's own sampler with eta {eta:g} add the custom nodes ComfyUI-TCD"
    acts = "Guidance and negative prompts act when it draws, at twice the cost."
    command = {
        "name": "Command line",
        "lines": ["PNGs with their settings inside, and a grid."],
        "code": f'lcmdistill sample {quote(str(run))} --steps {steps} --prompt "a prompt"',
    }
    if config.student.kind == "lora":
        file = f"{run.name}.safetensors"
        return [
            {
                "name": "diffusers",
                "lines": [
                    "Put the LoRA on the checkpoint that it was trained on"
                    + (f". {acts}" if free else "; its guidance is in its weights.")
                ],
                "code": _DIFFUSERS_LORA.format(
                    loaded=loading_code(config.teacher.model, _class_of(run / "lora" / file), method.scheduler),
                    run=run,
                    file=file,
                    call=method.pipeline_call(steps, guidance if free else 1),
                ),
            },
            {
                "name": "ComfyUI",
                "lines": [
                    f"Copy lora/{file} to models/loras.",
                    f"Load checkpoint, Load LoRA at strength 1, {comfy}.",
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
    export = f"lcmdistill export {quote(str(run))} --format single-file --output {quote(run.name)}.safetensors"
    return [
        {
            "name": "diffusers",
            "lines": [
                acts
                if free
                else "Guidance is an input of the network and costs nothing; negative prompts have no effect."
            ],
            "code": _DIFFUSERS_FULL.format(run=run, call=method.pipeline_call(steps, guidance)),
        },
        {
            "name": "ComfyUI",
            "lines": [
                "Write a single file, with the guidance baked in, and copy it to models/checkpoints:",
                f"Load checkpoint, then {comfy}.",
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
image = {call}.images[0]"""

_DIFFUSERS_LORA = """{loaded}pipeline.load_lora_weights("{run}/lora", weight_name="{file}")
image = {call}.images[0]"""
