"""Parts of a teacher that the user can change: its VAE and what that computes in, and how many CLIP layers are read."""

import json
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcmdistill.teachers.compat import dtype_option
from lcmdistill.teachers.hub_session import is_caused_by, limited_waiting
from lcmdistill.teachers.naming import is_local
from lcmdistill.teachers.registry import family_of_class
from lcmdistill.teachers.single_file.inspect import Header, inspect_checkpoint, read_header
from lcmdistill.utils.errors import RunError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TILE = 512
"the longest side of a tile in pixels; by default a VAE's tiles have its training size, which saves no memory at that size"

# What a replacement VAE must have in common with the one that the network was trained with.
_MUST_EQUAL: dict[str, Callable[[Any], float]] = {
    "{:g} latent channels": lambda vae: vae.config.latent_channels,
    "a downscale factor of {:g}": lambda vae: 2 ** (len(vae.config.block_out_channels) - 1),
    "a scaling factor of {:g}": lambda vae: vae.config.scaling_factor,
    "a shift of {:g}": lambda vae: getattr(vae.config, "shift_factor", None) or 0.0,
}


def replace_vae(pipeline: Any, vae: str, *, allow_pickle: bool = False) -> None:
    """Replace a pipeline's VAE.

    Args:
        pipeline: A pipeline with a VAE.
        vae: A .safetensors file, a diffusers folder or a hub id, of a VAE or of a pipeline with one.
        allow_pickle: Whether to open pickled weights.

    Raises:
        UsageError: There is no such VAE, or the network cannot have been trained with it.
        RunError: The hub cannot be reached.
    """
    current = pipeline.components.get("vae")
    if current is None:
        raise UsageError(f"--vae {vae}: the teacher, a {type(pipeline).__name__}, has no VAE to replace")
    if (class_name := type(current).__name__) != "AutoencoderKL":
        raise UsageError(
            f"--vae {vae}: the teacher's VAE is of the class {class_name}, and only an AutoencoderKL can be replaced; "
            "remove --vae"
        )
    replacement = _load_vae(vae, current, allow_pickle).eval().requires_grad_(False)
    if missing := [name for name, value in replacement.state_dict().items() if value.is_meta]:
        raise UsageError(f"--vae {vae} lacks {len(missing)} weights, such as {missing[0]}; use a complete VAE")
    for what, value_of in _MUST_EQUAL.items():
        if abs(value_of(replacement) - value_of(current)) > 1e-3 * abs(value_of(current)):
            raise UsageError(
                f"--vae {vae} has {what.format(value_of(replacement))} and the teacher's network was trained on "
                f"{what.format(value_of(current))}; use a VAE of its family"
            )
    pipeline.register_modules(vae=replacement)


def _load_vae(vae: str, current: Any, allow_pickle: bool, *, local_only: bool = False) -> Any:
    """Return an AutoencoderKL in fp32.

    Args:
        vae: As for `replace_vae`.
        current: The teacher's VAE, whose config a single file is read with.
        allow_pickle: Whether to open pickled weights.
        local_only: Whether to look for a hub id in the local cache only.

    Raises:
        UsageError: There is no such VAE.
        RunError: The hub cannot be reached.
    """
    from diffusers import AutoencoderKL

    path, kind = Path(vae).expanduser(), AutoencoderKL
    try:
        if path.is_file():
            return _single_file(path, current)
        is_folder = path.is_dir()
        if not is_folder and is_local(vae):
            raise UsageError(f"--vae {vae} does not exist; use a diffusers folder, a .safetensors file or a hub id")
        options: dict[str, Any] = {"use_safetensors": None if allow_pickle else True, **dtype_option(torch.float32)}
        name = str(path) if is_folder else vae
        if is_folder and not (path / "config.json").is_file():
            options["subfolder"] = "vae"
        if local_only:
            options["local_files_only"] = True
        with limited_waiting():
            where = {key: options[key] for key in ("subfolder", "local_files_only") if key in options}
            try:
                config: Any = kind.load_config(name, **where)
            except OSError as error:
                if is_folder or is_caused_by(error, "HubStalled"):
                    raise
                options["subfolder"] = "vae"  # of a whole pipeline on the hub
                config = kind.load_config(name, **where, subfolder="vae")
            if (class_name := config.get("_class_name")) != kind.__name__:
                raise UsageError(f"--vae {vae} is a {class_name}; the latents of a distillation need an AutoencoderKL")
            return kind.from_pretrained(name, **options)
    except UsageError:
        raise
    except Exception as error:  # a loader raises whatever it meets in files of another kind
        reason = str(error).strip().split("\n")[0]
        if is_caused_by(error, "HubStalled") and not local_only:
            return _load_vae(vae, current, allow_pickle, local_only=True)
        if not path.exists() and (local_only or is_caused_by(error, "LocalEntryNotFoundError")):
            raise RunError(f"--vae {vae} is not in the local cache and the hub cannot be reached") from error
        if "meta tensor" in reason:  # a weight that no file holds
            reason = "weights are missing, or their names are unknown; use a complete VAE, or its diffusers folder"
        raise UsageError(f"--vae {vae} cannot be read as a VAE: {reason}") from error


def _single_file(path: Path, current: Any) -> Any:
    """Return the VAE of a single file, or the one inside a checkpoint. Raises UsageError on a pickle."""
    from diffusers import AutoencoderKL

    if path.suffix != ".safetensors":
        raise UsageError(f"--vae {path} is not a .safetensors file; a pickle can run any code when opened")
    header = read_header(path)  # raises a readable error on a broken file
    prefix = "first_stage_model." if any(key.startswith("first_stage_model.") for key in header.tensors) else ""
    scales = (
        key for key in header.tensors if key.startswith(prefix) and key.endswith((".scale_weight", ".weight_scale"))
    )
    if scale := next(scales, None):
        raise UsageError(
            f"--vae {path} is scaled fp8 ({scale}), and a VAE's scales are not applied; use a VAE in fp32, fp16 or bf16"
        )
    with tempfile.TemporaryDirectory() as folder:
        values = {key: value for key, value in current.config.items() if not key.startswith("_")}
        values |= _checkpoint_scale(path, header) if prefix else {}
        (Path(folder) / "config.json").write_text(json.dumps(values | {"_class_name": "AutoencoderKL"}))
        return AutoencoderKL.from_single_file(
            str(path), config=folder, local_files_only=True, **dtype_option(torch.float32)
        )


def _checkpoint_scale(path: Path, header: Header) -> dict[str, Any]:
    """Return the scale and the shift of the VAE in a checkpoint, which every program assumes; {} for an unknown kind."""
    try:
        layout = inspect_checkpoint(path, header).layout
    except UsageError:  # its VAE may be usable nevertheless
        return {}
    return {"scaling_factor": layout.latent_scale, "shift_factor": layout.latent_shift or None}


def configure_vae(pipeline: Any, dtype: str, *, tiling: bool) -> None:
    """Make a pipeline's VAE compute in its own dtype whatever surrounds it. Its weights stay as they are.

    Args:
        pipeline: A pipeline of any kind; without a VAE nothing happens.
        dtype: A key of DTYPES. bf16 and fp16 compute under autocast; fp32 keeps any outer autocast out.
        tiling: Whether to work image by image, in overlapping tiles of at most TILE pixels a side.
    """
    vae, compute_dtype = pipeline.components.get("vae"), DTYPES[dtype]
    if vae is None:
        return

    def in_its_dtype(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(x: torch.Tensor, *args: Any, **options: Any) -> Any:
            device = vae.device.type
            if compute_dtype == torch.float32 and not torch.is_autocast_enabled(device):
                return method(x.to(vae.dtype), *args, **options)
            with torch.autocast(device, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
                return method(x.to(vae.dtype), *args, **options)

        return call

    vae.encode, vae.decode = in_its_dtype(vae.encode), in_its_dtype(vae.decode)
    if tiling:
        vae.enable_slicing()
        vae.enable_tiling()
        if "sample_size" in vae.config:  # tiles have its size by default; those of VAEs without it are of TILE pixels
            vae.tile_sample_min_size = side = min(TILE, *np.atleast_1d(vae.config.sample_size).tolist())
            vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
    if tiling or compute_dtype != torch.float32:
        pipeline.register_to_config(_vae=f"{dtype}{', tiled' * tiling}")


def skip_last_layers(pipeline: Any, count: int) -> None:
    """Skip CLIP's last `count` layers, as diffusers' `clip_skip` does.

    Where the family allows, the layers are made to add nothing, so that every program that reads the saved files follows.
    SDXL's second encoder needs its last layer for the pooled embedding: there the count is recorded in the pipeline's config.

    Raises:
        UsageError: The pipeline has no CLIP, or the count leaves no layer.
    """
    name = type(pipeline).__name__
    family = family_of_class(name)
    encoders = [pipeline.components.get(part) for part in family.text_encoders] if family else []
    layers = [_clip_layers(encoder) for encoder in encoders]
    if family is None or family.clip_skip is None or not all(layers):
        raise UsageError(f"--clip-skip needs CLIP text encoders, and a {name} has none; remove the option")
    most = min(map(len, layers)) - family.clip_skip_offset
    if not 0 <= count <= most:
        raise UsageError(f"--clip-skip is {count}; this teacher's text encoder can skip 0 to {most} of its layers")
    if family.clip_skip == "recorded":
        pipeline.register_to_config(_clip_skip=count)
        return
    with torch.no_grad():
        for layer in layers[0][len(layers[0]) - count :]:
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()


def _clip_layers(encoder: Any) -> list[Any]:
    """Return the layers of a CLIP text encoder, first to last; [] if it is none."""
    modules = [] if encoder is None else encoder.named_modules()
    return next((list(part) for path, part in modules if path.endswith("encoder.layers")), [])
