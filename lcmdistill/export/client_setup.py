"""What ComfyUI and A1111 must be set to before they sample a student, or why they cannot."""

from lcmdistill.export.a1111_config import BETA_SCHEDULES, needs_config
from lcmdistill.export.base import ProgramUse, Usage
from lcmdistill.export.sampling_facts import SamplingFacts

NODE_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"prediction type -> the setting of the node ModelSamplingDiscrete; `lcm` there samples every model as an epsilon model"

COMFYUI_SHIFT = 3.0
"the shift that ComfyUI gives to transformers of Stable Diffusion 3"


def comfyui_refusal(facts: SamplingFacts, *, of_checkpoint: bool = False) -> str:
    """Return why ComfyUI cannot sample a student, or ""; of_checkpoint: as for `comfyui_node`."""
    if of_checkpoint and not facts.has_single_file:
        return f"a single file cannot hold a model of its kind that predicts {facts.prediction_type}; use diffusers"
    if facts.betas:
        return f"its betas ({facts.betas}) are not Stable Diffusion's, and no node sets them; use diffusers"
    return ""


def a1111_refusal(facts: SamplingFacts) -> str:
    """Return why A1111 cannot sample a student, or ""."""
    if facts.prediction_type not in ("epsilon", "v_prediction"):
        return (
            f"it samples epsilon and v-prediction models, and this one predicts {facts.prediction_type}; use diffusers"
        )
    if facts.betas and (not facts.has_a1111_config or facts.betas.schedule not in BETA_SCHEDULES):
        return f"its betas ({facts.betas}) are not Stable Diffusion's; use diffusers"
    return ""


def comfyui_node(facts: SamplingFacts, *, of_checkpoint: bool = False) -> str:
    """Return the ComfyUI node that a student needs, or "".

    ComfyUI reads the prediction type and zero-terminal SNR from SDXL files only, by keys that exports have.

    Args:
        facts: How the student is sampled.
        of_checkpoint: Whether the student is in a checkpoint that was exported, instead of in a LoRA on any checkpoint.
    """
    if facts.family.embeds_guidance:  # at 1024 px this is ComfyUI's default
        return "node ModelSamplingFlux set to the image's width and height"
    if facts.is_flow:  # native for transformers; the node turns any network into one of flow matching
        is_native = facts.family.network != "unet" and facts.shift in (None, COMFYUI_SHIFT)
        shift = "the teacher's shift" if facts.shift is None else f"shift {facts.shift:g}"
        return "" if is_native else f"node ModelSamplingSD3 set to {shift}"
    is_plain = facts.prediction_type == "epsilon" and not facts.zero_snr
    if is_plain or (facts.has_prediction_keys and of_checkpoint):
        return ""
    zsnr = ", `zsnr = true`" if facts.zero_snr else ""
    node = f"node ModelSamplingDiscrete set to `{NODE_SAMPLING[facts.prediction_type]}`{zsnr}"
    if facts.has_prediction_keys and facts.prediction_type == "v_prediction":
        return f"{node}, unless the checkpoint has {_markers(facts)}"
    return node


def a1111_needs(facts: SamplingFacts, checkpoint: str, *, of_checkpoint: bool = False) -> str:
    """Return what A1111 needs besides the sampler's settings, or "".

    Args:
        facts: How the student is sampled.
        checkpoint: The checkpoint's name without its ending.
        of_checkpoint: Whether the student is in a checkpoint that was exported, instead of in a LoRA on any checkpoint.
    """
    needs = []
    if needs_config(facts):
        values = ["parameterization: v"] if facts.prediction_type == "v_prediction" else []
        if facts.betas:
            values.append(f"linear_start: {facts.betas.start:g}, linear_end: {facts.betas.end:g}")
            values.append(f"beta_schedule: {BETA_SCHEDULES[facts.betas.schedule]}, timesteps: {facts.betas.num_steps}")
        origin = (
            "which the export writes" if of_checkpoint else f"a copy of v1-inference.yaml with `{', '.join(values)}`"
        )
        needs.append(f"the file {checkpoint}.yaml next to the checkpoint ({origin})")
    if facts.has_prediction_keys and facts.prediction_type == "v_prediction" and not of_checkpoint:
        needs.append(f"a checkpoint with {_markers(facts)}")
    if not facts.has_prediction_keys and facts.zero_snr:
        needs.append('"Zero Terminal SNR" chosen in Settings, Noise schedule for sampling')
    return ", and ".join(needs)


def _markers(facts: SamplingFacts) -> str:
    """Return the keys by which an SDXL checkpoint states v-prediction and zero-terminal SNR."""
    return "the keys `v_pred` and `ztsnr`" if facts.zero_snr else "the key `v_pred`"


def header_needs(facts: SamplingFacts, checkpoint: str, *, of_checkpoint: bool = False) -> str:
    """Return the end of a file's usage hint: what ComfyUI and A1111 need, or that they cannot sample it.

    Args:
        facts: How the student is sampled.
        checkpoint: The checkpoint's name without its ending.
        of_checkpoint: As for `comfyui_node`.
    """
    refusals = {
        "ComfyUI": comfyui_refusal(facts, of_checkpoint=of_checkpoint),
        "A1111": "" if facts.is_flow else a1111_refusal(facts),
    }
    needs = {
        "ComfyUI": comfyui_node(facts, of_checkpoint=of_checkpoint),
        "A1111": a1111_needs(facts, checkpoint, of_checkpoint=of_checkpoint),
    }
    texts = {name: f"cannot sample it: {refusals[name]}" if refusals[name] else needs[name] for name in needs}
    return "".join(f"; {name}: {text}" for name, text in texts.items() if text)


def program_uses(
    usage: Usage,
    checkpoint: str,
    comfy: tuple[str, str],
    a1111: tuple[str, str] | None,
    *,
    of_checkpoint: bool = False,
) -> tuple[ProgramUse, ...]:
    """Return how a file is used in ComfyUI and A1111.

    Args:
        usage: The facts of the export.
        checkpoint: The name of the checkpoint that is loaded, without its ending.
        comfy: The folder for ComfyUI, and what precedes the sampler's settings.
        a1111: The same for A1111; None for a model that A1111 does not know.
        of_checkpoint: As for `comfyui_node`.
    """
    facts, file = usage.facts, usage.file
    in_comfy, in_a1111 = _sampler_lines(usage, checkpoint, of_checkpoint=of_checkpoint)
    places = [("ComfyUI", comfyui_refusal(facts, of_checkpoint=of_checkpoint), comfy, in_comfy)]
    if a1111:
        places.append(("A1111", a1111_refusal(facts), a1111, in_a1111))
    return tuple(
        ProgramUse(name, (f"Cannot sample this student: {refusal}.",), is_supported=False)
        if refusal
        else ProgramUse(name, (f"Copy {file} to {folder}.", f"{before}{settings}."))
        for name, refusal, (folder, before), settings in places
    )


def _sampler_lines(usage: Usage, checkpoint: str, *, of_checkpoint: bool) -> tuple[str, str]:
    """Return the settings of the sampler in ComfyUI and in A1111, with the node and the files that the student needs."""
    method, facts = usage.method, usage.facts
    spacing = "simple" if facts.is_flow else "sgm_uniform"
    node, needs = comfyui_node(facts, of_checkpoint=of_checkpoint), ""
    if not a1111_refusal(facts):
        needs = a1111_needs(facts, checkpoint, of_checkpoint=of_checkpoint)
    comfy = f"KSampler: sampler {method.comfyui_sampler}, scheduler {spacing}, {usage.settings}"
    comfy += f"; {node}" if node else ""
    schedule = ", schedule type SGM Uniform" if method.deterministic else ""
    a1111 = f"sampler {method.sampler}{schedule}, {usage.settings}"
    eta = method.sampling_options.get("eta")
    if eta is not None:  # with eta 1 its sampler is LCM's
        sampler = method.sampler
        comfy += f"; for the {sampler} sampler with eta {eta:g} install the custom nodes ComfyUI-{sampler}"
        a1111 = f"sampler {sampler} with eta {eta:g}, or LCM if there is no {sampler}, {usage.settings}"
    return comfy, f"{a1111}; needs {needs}" if needs else a1111
