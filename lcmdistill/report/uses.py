"""How to use a run's files in diffusers, ComfyUI, A1111 and on the command line."""

from pathlib import Path
from shlex import quote
from typing import Any

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.students.lora_files import family_of_lora
from lcmdistill.teachers.naming import loading_code


def uses(run: Path, config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """Return one card per program: name, lines of text, and code or None.

    Args:
        run: The run folder.
        config: The recorded configuration.
        steps: The recommended number of sampling steps.
    """
    method, free = config.objective.info, omega_range(config) is None
    guidance = config.run.validation_guidance_scale or 1.0
    settings = f"{steps} steps, CFG {guidance if free else 1:g}"
    sampler, comfy = (
        f"sampler {method.sampler}, {settings}",
        f"ModelSamplingDiscrete set to lcm; KSampler: sampler LCM, {settings}",
    )
    eta = method.sampling_options.get("eta")
    if eta is not None:  # with eta 1 it equals the LCM sampler
        sampler = f"sampler TCD with eta {eta:g}, or LCM if TCD is not available, {settings}"
        comfy += f". For TCD's own sampler with eta {eta:g} add the custom nodes ComfyUI-TCD"
    free_note = "CFG and negative prompts work, at twice the cost."
    command = {
        "name": "Command line",
        "lines": ["PNGs with embedded settings, and a grid."],
        "code": f'lcmdistill sample {quote(str(run))} --steps {steps} --prompt "a prompt"',
    }
    if config.student.kind == "lora":
        file = f"{run.name}.safetensors"
        return [
            {
                "name": "diffusers",
                "lines": [
                    "Load the LoRA on the checkpoint that it was trained on"
                    + (f". {free_note}" if free else "; its guidance is baked into its weights.")
                ],
                "code": _DIFFUSERS_LORA.format(
                    loaded=loading_code(
                        config.teacher.model, family_of_lora(run / "lora").pipeline_classes[0], method.scheduler
                    ),
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
                    f"Add <lora:{run.name}:1> to the prompt; {sampler}.",
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
                free_note
                if free
                else "Guidance is an input of the network and adds no cost; negative prompts have no effect."
            ],
            "code": _DIFFUSERS_FULL.format(run=run, call=method.pipeline_call(steps, guidance)),
        },
        {
            "name": "ComfyUI",
            "lines": [
                "Export a single file with baked-in guidance, and copy it to models/checkpoints:",
                f"Load checkpoint, then {comfy}.",
            ],
            "code": export,
        },
        {
            "name": "A1111",
            "lines": ["Copy the same single file to models/Stable-diffusion.", f"Settings: {sampler}."],
            "code": export,
        },
        command,
    ]


_DIFFUSERS_FULL = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{run}/pipeline")
image = {call}.images[0]"""

_DIFFUSERS_LORA = """{loaded}pipeline.load_lora_weights("{run}/lora", weight_name="{file}")
image = {call}.images[0]"""
