"""Run a job in ComfyUI's engine: `python comfyui_driver.py CHECKOUT JOB.json`. It imports nothing of lcmdistill.

A job names a checkpoint, and optionally a LoRA, the settings of the ModelSamplingDiscrete node, a sampler with its steps, and a
file of noise. The latents, the images and what the engine took the model for are written to the job's output. With a file of
embeddings only the network is loaded, and there are no images: text encoders of some families have one size in ComfyUI.
"""

import json
import sys
from pathlib import Path
from typing import Any

from stand_ins import Finder  # pyright: ignore[reportMissingImports]


def main(checkout: str, job_file: str) -> None:
    """Run one job."""
    job = json.loads(Path(job_file).read_text())
    sys.meta_path.insert(0, Finder())  # pyright: ignore[reportArgumentType]
    sys.path.insert(0, checkout)
    sys.argv = ["main.py", "--cpu", "--force-fp32"]
    import comfy.options  # pyright: ignore[reportMissingImports]

    comfy.options.enable_args_parsing()
    import comfy.lora  # pyright: ignore[reportMissingImports]
    import comfy.model_sampling  # pyright: ignore[reportMissingImports]
    import comfy.sample  # pyright: ignore[reportMissingImports]
    import comfy.samplers  # pyright: ignore[reportMissingImports]
    import comfy.sd  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_grad_enabled(False)
    results: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    clip: Any = None
    vae: Any = None
    if job.get("embeddings"):
        model = comfy.sd.load_diffusion_model(job["checkpoint"])
    else:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            job["checkpoint"], output_vae=True, output_clip=True
        )
    sampling = model.model.model_sampling
    results["class"] = type(model.model.model_config).__name__
    kind = "v_prediction" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "epsilon"
    results["detected"] = [kind, bool(getattr(sampling, "zsnr", False))]
    if job.get("lora"):
        lora = comfy.utils.load_torch_file(job["lora"])
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        if clip is not None:
            keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        results["lora_modules"] = len(comfy.lora.load_lora(lora, keys))
        model, clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    if job.get("node"):
        kinds = {"eps": comfy.model_sampling.EPS, "v_prediction": comfy.model_sampling.V_PREDICTION}
        base = comfy.model_sampling.ModelSamplingDiscrete
        patched = type("Advanced", (base, kinds[job["node"]["sampling"]]), {})
        model = model.clone()
        model.add_object_patch("model_sampling", patched(model.model.model_config, zsnr=job["node"]["zsnr"]))
        sampling = model.get_model_object("model_sampling")
    tensors["sigmas"] = sampling.sigmas.clone()
    if job.get("noise"):
        noise = load_file(job["noise"])["noise"]
        if job.get("embeddings"):
            given = load_file(job["embeddings"])
            positive = negative = [[given["prompt_embeds"], {"pooled_output": given["pooled"]}]]
        else:
            positive, negative = (
                clip.encode_from_tokens_scheduled(clip.tokenize(job[key])) for key in ("prompt", "negative")
            )
        for key in ("sampler", "scheduler"):
            assert job[key] in (comfy.samplers.SAMPLER_NAMES if key == "sampler" else comfy.samplers.SCHEDULER_NAMES)
        tensors["steps"] = comfy.samplers.calculate_sigmas(sampling, job["scheduler"], job["steps"])
        latents = comfy.sample.sample(
            model,
            noise,
            job["steps"],
            job["cfg"],
            job["sampler"],
            job["scheduler"],
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        tensors["latents"] = latents
        if vae is not None:
            tensors["images"] = vae.decode(latents)
        tensors["embeds"] = positive[0][0]
    save_file({key: value.float().cpu().contiguous().clone() for key, value in tensors.items()}, job["output"])
    Path(job["output"]).with_suffix(".json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
