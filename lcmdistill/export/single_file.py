"""A pipeline as one checkpoint file of the kind that A1111 and ComfyUI open."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcmdistill.config.schema import RunConfig
from lcmdistill.export.bake_guidance import bake_omega
from lcmdistill.export.sd_keys import TEXT_STYLES, original_unet, original_vae
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.sampling.student_pipeline import STEPS
from lcmdistill.teachers.family import SingleFileLayout
from lcmdistill.teachers.naming import license_name, license_of, public_name
from lcmdistill.teachers.registry import family_of, family_of_folder
from lcmdistill.utils.errors import RunError, UsageError


def layout_of(pipeline: Any) -> SingleFileLayout:
    """The original layout of a diffusers pipeline.

    Raises UsageError on a pipeline without a first text encoder (SDXL's refiner), or of a family that has no layout.
    """
    family = family_of(pipeline)
    if family.layout_of is None:
        raise UsageError(f"there is no single-file layout for a {type(pipeline).__name__}; use --format pipeline")
    if any(getattr(pipeline, name, None) is None for name in family.text_encoders):
        raise UsageError("a pipeline without its first text encoder cannot be written as a single file")
    return family.layout_of(pipeline.unet.config)


def original_tensors(pipeline: Any, unet: Any) -> dict[str, Tensor]:
    """All weights under the original keys; unet: takes the pipeline's place and has no omega input.

    Raises RunError on a weight that has no place in the layout.
    """
    tensors = original_unet(unet.state_dict(), unet.config)
    tensors |= original_vae(pipeline.vae.state_dict(), pipeline.vae.config)
    for name, (prefix, style) in layout_of(pipeline).text_encoders.items():
        encoder = getattr(pipeline, name)
        tensors |= TEXT_STYLES[style](encoder.state_dict(), encoder.config, prefix)
    return tensors


def write_single_file(
    pipeline: Any,
    path: Path,
    *,
    dtype: torch.dtype,
    guidance_scale: float | None = None,
    metadata: Mapping[str, str] | None = None,
    method: MethodInfo = LatentConsistency.info,
    cfg: float = 1.0,
) -> None:
    """Write `path` (.safetensors).

    guidance_scale: diffusers' convention, omega + 1; baked into a U-Net with an omega input, which needs it, and not
    allowed otherwise. metadata: header strings, which win over the ones made here. method, cfg: how it was distilled, and
    the CFG scale to draw with. Raises UsageError on what cannot be
    written, RunError on a weight that has no place in the layout or is not finite in `dtype`.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"a single file is read by its ending; name it {path.stem}.safetensors instead of {path.name}")
    header = {**header_of(pipeline, guidance_scale, method, cfg), "modelspec.title": path.stem, **(metadata or {})}
    tensors = original_tensors(pipeline, unet_for_file(pipeline.unet, guidance_scale))
    tensors = {key: _cast(key, value, dtype) for key, value in tensors.items()} | _markers(pipeline.scheduler.config)
    save_file(tensors, path, metadata=header)


def unet_for_file(unet: Any, guidance_scale: float | None) -> Any:
    """The U-Net as a file holds it: omega baked in. Raises UsageError if it needs a guidance and has none, or the reverse."""
    if guidance_scale is not None:
        return bake_omega(unet, guidance_scale)
    if unet.config.time_cond_proj_dim is not None:
        raise UsageError("single files have no omega input; say which guidance to bake in with --guidance-scale")
    return unet


def architecture_of(pipeline: Any, prediction_type: str) -> str | None:
    """ModelSpec's name of a pipeline's architecture, None for a prediction type that it has none for."""
    return layout_of(pipeline).architectures.get(prediction_type)


def file_header(config: RunConfig, title: str) -> dict[str, str]:
    """What a run's settings tell of a file: its title, licence, author, and what it was made from."""
    model, repo = config.teacher.model, config.run.push_to_hub
    base, licence, method = public_name(model), license_name(license_of(model)), config.objective.info
    told = {"modelspec.title": title, "modelspec.description": f"{method.title} {method.relation} {base}"}
    told |= {"modelspec.license": licence} if licence else {}
    return told | ({"modelspec.author": repo.partition("/")[0]} if repo else {})


def header_of(
    pipeline: Any, guidance_scale: float | None, method: MethodInfo = LatentConsistency.info, cfg: float = 1.0
) -> dict[str, str]:
    """The safetensors header: what the file is and how it is to be sampled (ModelSpec 1.0.1).

    Raises UsageError on a prediction type that the programs do not know.
    """
    prediction, unet = pipeline.scheduler.config.get("prediction_type", "epsilon"), pipeline.unet
    architecture = architecture_of(pipeline, prediction)
    if architecture is None:
        raise UsageError(f"a single file's readers know epsilon and v-prediction; this model predicts {prediction!r}")
    baked = (
        "" if guidance_scale is None else f"; guidance {guidance_scale:g} (omega {guidance_scale - 1:g}) is built in"
    )
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "sgm",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "modelspec.tags": ", ".join(method.tags),
        "modelspec.usage_hint": f"{method.sampler} sampler, {STEPS} steps (2 to 8), CFG scale {cfg:g}{baked}",
        "lcmdistill.recommended_sampler": method.sampler,
        "lcmdistill.recommended_steps": str(STEPS),
        "lcmdistill.recommended_cfg_scale": f"{cfg:g}",
        "lcmdistill.vae_scaling_factor": f"{pipeline.vae.config.scaling_factor:g}",
    }
    size = unet.config.sample_size
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        header["modelspec.resolution"] = f"{width * factor}x{height * factor}"
    if guidance_scale is not None:
        header["lcmdistill.guidance_scale"] = f"{guidance_scale:g}"
        header["lcmdistill.omega"] = f"{guidance_scale - 1:g}"
    return header


def _markers(scheduler_config: Any) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and A1111 know v-prediction and zero-terminal SNR; they read no header."""
    if scheduler_config.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if scheduler_config.get("rescale_betas_zero_snr") else ["v_pred"]
    return {name: torch.tensor([]) for name in names}


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, contiguous, floats in dtype. Raises RunError if that makes an infinity."""
    if value.is_floating_point():
        value = value.to("cpu", dtype)
        if not torch.isfinite(value).all():
            raise RunError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}; choose another --dtype")
    return value.cpu().contiguous()


@contextmanager
def configs_of(pipeline: Any) -> Iterator[Path]:
    """A passing folder with a pipeline's configs and tokenizers and no weight: what its file is read back with."""
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing)
        pipeline.save_config(folder)
        for name in pipeline.components:
            _save_config(getattr(pipeline, name), folder / name)
        # diffusers cannot read a single file for a U-Net whose config has an omega input; the file's has none.
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "time_cond_proj_dim": None}))
        del pipeline  # so that who lets go of it has its memory back
        yield folder


def _save_config(part: Any, folder: Path) -> None:
    """A part's config, or a part without weights as a whole."""
    if part is not None:
        save: Any = part.save_pretrained if not isinstance(part, nn.Module) else getattr(part, "save_config", None)
        config: Any = getattr(part, "config", None)
        (save or config.save_pretrained)(folder)


def read_back(path: Path, configs: Path) -> Any:
    """The pipeline in a single file, through diffusers' own loader and without a network. configs: from `configs_of`."""
    import diffusers

    family = family_of_folder(configs)
    assert family is not None, "configs_of wrote it"
    kind = getattr(diffusers, family.pipeline_classes[0])
    return kind.from_single_file(str(path), config=str(configs), local_files_only=True, **family.single_file_options)
