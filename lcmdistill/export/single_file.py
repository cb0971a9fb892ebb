"""The format `single-file`: one checkpoint with U-Net, VAE and text encoders for ComfyUI and A1111."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.lora_words import with_loras
from lcmdistill.config.schema import RunConfig
from lcmdistill.export.a1111_config import config_text, needs_config
from lcmdistill.export.bake_guidance import bake_omega
from lcmdistill.export.base import (
    Exporter,
    ExportRequest,
    ProgramUse,
    Usage,
    merge_adapter,
    require_support,
    unverified,
)
from lcmdistill.export.client_sampling import check_sampling, sample_as_trained
from lcmdistill.export.client_setup import header_needs, program_uses
from lcmdistill.export.sampling_facts import facts_from_pipeline
from lcmdistill.export.trained_student import TrainedStudent
from lcmdistill.export.vae_scale import absorb_scale, absorbed_note
from lcmdistill.export.verify import BOUNDS, check_close, pipeline_outputs
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.students.lora_files import SCHEDULER_OPTIONS_KEY
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.family import SingleFileLayout
from lcmdistill.teachers.naming import license_name, license_of, public_name
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of, family_of_folder
from lcmdistill.teachers.single_file.mmdit_keys import original_mmdit
from lcmdistill.teachers.single_file.sd_keys import TEXT_STYLES, original_unet, original_vae
from lcmdistill.utils.atomic import atomic_file, write_text
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.json_text import parse_json

COMPANION = ".yaml"
"the ending of the configuration file that A1111 reads next to a checkpoint"


def layout_of(pipeline: Any) -> SingleFileLayout:
    """Return the original layout of a diffusers pipeline.

    Raises:
        UsageError: The family has no layout, or the pipeline lacks a text encoder (SDXL's refiner).
    """
    family = family_of(pipeline)
    if family.layout_of is None:
        raise UsageError(f"there is no single-file layout for a {type(pipeline).__name__}; use --format pipeline")
    layout = family.layout_of(network_of(pipeline).config)
    needed = (name for name in family.text_encoders if name not in layout.optional_encoders)
    if any(getattr(pipeline, name, None) is None for name in needed):
        raise UsageError("a pipeline without its first text encoder cannot be written as a single file")
    return layout


def original_tensors(pipeline: Any, network: Any) -> dict[str, Tensor]:
    """Return all weights under their original keys.

    Args:
        pipeline: The student's pipeline.
        network: Replaces the pipeline's U-Net or transformer; it has no guidance input.

    Raises:
        RunError: A weight has no key in the layout.
    """
    layout = layout_of(pipeline)
    if layout.network_marker:
        tensors = original_mmdit(network.state_dict(), network.config.num_layers)
    else:
        tensors = original_unet(network.state_dict(), network.config)
    tensors |= original_vae(pipeline.vae.state_dict(), pipeline.vae.config)
    for name, (prefix, style) in layout.text_encoders.items():
        encoder = getattr(pipeline, name)
        if encoder is None:
            continue
        tensors |= TEXT_STYLES[style](encoder.state_dict(), encoder.config, prefix)
    return tensors


def write_single_file(
    pipeline: Any,
    path: Path,
    *,
    dtype: torch.dtype,
    guidance_scale: float | None = None,
    metadata: Mapping[str, str] | None = None,
    usage: Usage | None = None,
) -> None:
    """Write a pipeline as one checkpoint file.

    Args:
        pipeline: The student's pipeline.
        path: The file, which ends in .safetensors.
        dtype: The dtype of the weights.
        guidance_scale: The guidance to bake in (omega + 1); required for a U-Net with a guidance input, None otherwise.
        metadata: Header strings, which override the generated ones.
        usage: How the student is sampled; by default as an LCM.

    Raises:
        UsageError: The pipeline has no single-file layout.
        RunError: A weight has no key in the layout, or is not finite in `dtype`.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"a single file must end in .safetensors; use {path.stem}.safetensors instead of {path.name}")
    header = {**header_of(pipeline, guidance_scale, usage), "modelspec.title": path.stem, **(metadata or {})}
    tensors = original_tensors(pipeline, network_for_file(network_of(pipeline), guidance_scale))
    tensors = absorb_scale(tensors, pipeline.vae.config, layout_of(pipeline))
    tensors = {key: _cast(key, value, dtype) for key, value in tensors.items()} | _markers(pipeline.scheduler.config)
    save_file(tensors, path, metadata=header)


def network_for_file(network: Any, guidance_scale: float | None) -> Any:
    """Return the U-Net or transformer as a file holds it, with guidance baked in.

    Raises:
        UsageError: The U-Net needs a guidance scale and got none, or takes none and got one.
    """
    if guidance_scale is not None:
        return bake_omega(network, guidance_scale)
    if has_omega_input(network):
        raise UsageError("single files have no guidance input; specify the guidance to bake in with --guidance-scale")
    return network


def architecture_of(pipeline: Any, prediction_type: str) -> str | None:
    """Return ModelSpec's name for a pipeline's architecture; None for a prediction type without one."""
    return layout_of(pipeline).architectures.get(prediction_type)


def file_header(config: RunConfig, title: str) -> dict[str, str]:
    """Return the header strings that a run decides: title, license, author, and what the student was made from."""
    model, repo, method = config.teacher.model, config.run.push_to_hub, config.objective.info
    name = license_name(license_of(model))
    header = {
        "modelspec.title": title,
        "modelspec.description": f"{method.title} {method.relation} {with_loras(public_name(model), config.teacher.loras)}",
    }
    header |= {"modelspec.license": name} if name else {}
    return header | ({"modelspec.author": repo.partition("/")[0]} if repo else {})


def header_of(pipeline: Any, guidance_scale: float | None, usage: Usage | None = None) -> dict[str, str]:
    """Return the safetensors header: what the file is and how it is sampled (ModelSpec 1.0.1).

    Args:
        pipeline: The student's pipeline.
        guidance_scale: The guidance that is baked in, or None.
        usage: How the student is sampled; by default as an LCM.

    Raises:
        UsageError: ComfyUI and A1111 do not support the prediction type.
    """
    scheduler, network = pipeline.scheduler.config, network_of(pipeline)
    _, prediction = family_of(pipeline).denoiser(scheduler)
    layout = layout_of(pipeline)
    architecture = layout.architectures.get(prediction)
    if architecture is None:
        raise UsageError(
            f"a single file of {layout.title} holds a model that predicts {' or '.join(layout.architectures)}, and this one "
            f"predicts {prediction}; use --format pipeline, or --format fused for a LoRA"
        )
    baked = (
        "" if guidance_scale is None else f"; guidance {guidance_scale:g} (omega {guidance_scale - 1:g}) is baked in"
    )
    facts = facts_from_pipeline(pipeline, layout.key)
    method = usage.method if usage else LatentConsistency.info
    counts = usage.counts if usage else method.steps(LatentConsistency())
    cfg, options = (usage.guidance_scale, usage.facts.scheduler_options) if usage else (1.0, {})
    needs = header_needs(facts, "FILE", of_checkpoint=True)
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "sgm",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": prediction.removesuffix("_prediction"),
        "modelspec.tags": ", ".join(method.tags),
        "modelspec.usage_hint": f"{method.sampler} sampler, {counts.text}, CFG scale {cfg:g}{baked}{needs}",
        "lcmdistill.recommended_sampler": method.sampler,
        "lcmdistill.recommended_steps": str(counts.recommended),
        "lcmdistill.recommended_cfg_scale": f"{cfg:g}",
        SCHEDULER_OPTIONS_KEY: json.dumps(dict(options)),
        "lcmdistill.vae_scaling_factor": f"{layout.latent_scale:g}",
    }
    if note := absorbed_note(pipeline.vae.config, layout):
        header["lcmdistill.vae"] = note
    size = network.config.sample_size
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        header["modelspec.resolution"] = f"{width * factor}x{height * factor}"
    if guidance_scale is not None:
        header["lcmdistill.guidance_scale"] = f"{guidance_scale:g}"
        header["lcmdistill.omega"] = f"{guidance_scale - 1:g}"
    return header


def _markers(scheduler_config: Any) -> dict[str, Tensor]:
    """Return the empty tensors that mark v-prediction and zero-terminal SNR for ComfyUI and A1111, which ignore headers."""
    if scheduler_config.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if scheduler_config.get("rescale_betas_zero_snr") else ["v_pred"]
    return {name: torch.tensor([]) for name in names}


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU, contiguous, floats in `dtype`; raise RunError if that overflows."""
    if value.is_floating_point():
        value = value.to("cpu", dtype)
        if not torch.isfinite(value).all():
            raise RunError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}; use another --dtype")
    return value.cpu().contiguous()


@contextmanager
def configs_of(pipeline: Any) -> Iterator[Path]:
    """Yield a temporary folder with a pipeline's configs and tokenizers, which `read_back` needs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline.save_config(folder)
        for name in pipeline.components:
            _save_config(getattr(pipeline, name), folder / name)
        # diffusers cannot read a single file for a U-Net whose config has an omega input; the file's has none. The file's
        # VAE has the scale that programs assume.
        layout = layout_of(pipeline)
        vae = {"scaling_factor": layout.latent_scale, "shift_factor": layout.latent_shift or None}
        for name, changes in {"unet": {"time_cond_proj_dim": None}, "vae": vae}.items():
            config = folder / name / "config.json"
            if config.is_file():
                config.write_text(json.dumps({**parse_json(config.read_text()), **changes}))
        del pipeline  # the caller can free its memory
        yield folder


def _save_config(part: Any, folder: Path) -> None:
    """Save a component's config, or all of a component without weights."""
    if part is not None:
        save: Any = part.save_pretrained if not isinstance(part, nn.Module) else getattr(part, "save_config", None)
        config: Any = getattr(part, "config", None)
        (save or config.save_pretrained)(folder)


def read_back(path: Path, configs: Path) -> Any:
    """Load the pipeline in a single file with diffusers' loader, offline; `configs` comes from `configs_of`."""
    import diffusers

    family = family_of_folder(configs)
    assert family is not None, "configs_of wrote it"
    kind = getattr(diffusers, family.pipeline_classes[0])
    options = {name: value for name, value in family.single_file_options.items() if not (configs / name).is_dir()}
    return kind.from_single_file(str(path), config=str(configs), local_files_only=True, **options)


def export_single_file(student: TrainedStudent, request: ExportRequest) -> str:
    """Write one checkpoint file; a LoRA is merged, and the guidance of a full student is baked in.

    Args:
        student: The trained student.
        request: What to write, and where.

    Returns:
        A sentence with the largest difference from the student.
    """
    path, pipeline = request.output, student.pipeline()
    require_support(pipeline, "single-file", student.config.student.kind, bool(family_of(pipeline).layouts))
    expected = pipeline_outputs(pipeline, request.guidance_scale) if request.verify else {}
    # ComfyUI samples flow matching in the same terms, and other betas not at all.
    is_checked = request.verify and not student.facts.is_flow and not student.facts.betas
    latents = sample_as_trained(pipeline, request.guidance_scale) if is_checked else None
    merge_adapter(student, pipeline)
    bakes = has_omega_input(network_of(pipeline))
    usage = SINGLE_FILE.usage(student.config, student.facts, str(path.parent), path.name)
    layout = layout_of(pipeline)
    configuration = config_text(pipeline, layout.latent_scale) if needs_config(student.facts) else None
    note = absorbed_note(pipeline.vae.config, layout)
    companion = path.with_suffix(COMPANION)
    if configuration is not None and companion.exists():
        raise UsageError(
            f"{companion} exists, and A1111 needs a file of that name for this student; specify a new --output"
        )
    with atomic_file(path) as partial, configs_of(pipeline) as configs:
        write_single_file(
            pipeline,
            partial,
            dtype=request.dtype,
            guidance_scale=request.guidance_scale if bakes else None,
            metadata=file_header(student.config, path.stem),
            usage=usage,
        )
        omegas, unseen = omega_range(student.config), ""
        if bakes and omegas and not omegas.low <= request.guidance_scale - 1 <= omegas.high:
            unseen = f"the student was trained with guidance scales of {omegas.scale} and never saw {request.guidance_scale:g}"
        sentence = unverified(path)
        if request.verify:
            del pipeline
            loaded, bound = read_back(partial, configs), BOUNDS[request.dtype]
            sentence = check_close(pipeline_outputs(loaded, request.guidance_scale), expected, bound, path)
        if latents is not None:
            with safe_open(partial, "pt") as file:
                keys = set(file.keys())
            sampled = check_sampling(loaded, request.guidance_scale, latents, student.facts, keys, bound)
            sentence = f"{sentence}, {sampled}"
        if configuration is not None:
            write_text(companion, configuration)
    return "; ".join(part for part in (sentence, note, unseen) if part)


def python_code(usage: Usage) -> str:
    """Return the Python code that downloads the file, opens it and generates an image."""
    kind, scheduler = usage.facts.family.pipeline_classes[0], usage.method.scheduler
    return f"""from diffusers import {scheduler}, {kind}
from huggingface_hub import hf_hub_download

pipeline = {kind}.from_single_file(hf_hub_download("{usage.place}", "{usage.file}"){usage.absent_options})
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config{usage.scheduler_options})
{usage.call}"""


def single_file_programs(usage: Usage) -> tuple[ProgramUse, ...]:
    """Return how the file is used in ComfyUI and A1111."""
    a1111 = None if usage.facts.is_flow else ("models/Stable-diffusion", "Settings: ")
    comfy = ("models/checkpoints", "Load Checkpoint, ")
    return program_uses(usage, usage.file.removesuffix(".safetensors"), comfy, a1111, of_checkpoint=True)


SINGLE_FILE = Exporter(
    key="single-file",
    title="one checkpoint file for ComfyUI and A1111",
    student_kinds=("full", "lora"),
    writes="file",
    write=export_single_file,
    python=python_code,
    programs=single_file_programs,
    bakes_guidance=True,
)
