"""What a user changes of a teacher's parts: its VAE and how that computes, its safety checker, CLIP's last layers."""

import json
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcmdistill.teachers.naming import is_local
from lcmdistill.teachers.single_file.inspect import read_header
from lcmdistill.utils.errors import RunError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TILE = 512
"the most pixels of a tile's side: a VAE's own tiles are as large as the images it was trained on, which saves nothing at those"

# What a VAE has in common with every other that a network could have been trained with.
_MUST_EQUAL: dict[str, Callable[[Any], float]] = {
    "{:g} latent channels": lambda vae: vae.config.latent_channels,
    "a downscale factor of {:g}": lambda vae: 2 ** (len(vae.config.block_out_channels) - 1),
    "a scaling factor of {:g}": lambda vae: vae.config.scaling_factor,
    "a shift of {:g}": lambda vae: getattr(vae.config, "shift_factor", None) or 0.0,
}


def replace_vae(pipeline: Any, vae: str, *, allow_pickle: bool = False) -> None:
    """Give a pipeline another VAE: a .safetensors file, or a diffusers folder or hub id, of a VAE or of a pipeline with one.

    Raises UsageError if there is none, or it is not one that the network can have been trained with.
    """
    own = pipeline.components.get("vae")
    if own is None:
        raise UsageError(f"--vae {vae}: the teacher, a {type(pipeline).__name__}, has no VAE to be replaced")
    other = _load_vae(vae, own, allow_pickle).eval().requires_grad_(False)
    if lost := [name for name, value in other.state_dict().items() if value.is_meta]:
        raise UsageError(f"--vae {vae} lacks {len(lost)} weights, such as {lost[0]}; give a whole VAE")
    for what, of in _MUST_EQUAL.items():
        if abs(of(other) - of(own)) > 1e-3 * abs(of(own)):
            raise UsageError(
                f"--vae {vae} has {what.format(of(other))} and the teacher's network was trained on {what.format(of(own))}; "
                "give a VAE of its family"
            )
    pipeline.register_modules(vae=other)


def _load_vae(vae: str, own: Any, allow_pickle: bool) -> Any:
    """An AutoencoderKL in fp32. own: the teacher's, whose config a single file is read with."""
    from diffusers import AutoencoderKL

    path, kind = Path(vae).expanduser(), AutoencoderKL
    try:
        if path.is_file():
            return _single_file(path, own)
        is_folder = path.is_dir()
        if not is_folder and is_local(vae):
            raise UsageError(f"--vae {vae}: there is none; give a diffusers folder, a .safetensors file or a hub id")
        options: dict[str, Any] = {"use_safetensors": None if allow_pickle else True, "torch_dtype": torch.float32}
        name = str(path) if is_folder else vae
        if is_folder and not (path / "config.json").is_file():
            options["subfolder"] = "vae"
        try:
            config: Any = kind.load_config(name, **{k: v for k, v in options.items() if k == "subfolder"})
        except OSError:
            if is_folder:
                raise
            options["subfolder"] = "vae"  # of a whole pipeline on the hub
            config = kind.load_config(name, subfolder="vae")
        if (found := config.get("_class_name")) != kind.__name__:
            raise UsageError(f"--vae {vae} is a {found}; the latents of a distillation need an AutoencoderKL")
        return kind.from_pretrained(name, **options)
    except UsageError:
        raise
    except Exception as error:  # a loader that is fed something else raises whatever it stumbles over
        said = str(error).strip().split("\n")[0]
        if not path.exists() and _is_unreachable(error):
            raise RunError(f"--vae {vae} is not in the local cache and the hub cannot be reached") from error
        if "meta tensor" in said:  # which is what a weight is that was found nowhere
            said = "weights are missing, or have names that are not known"
        raise UsageError(f"--vae {vae} cannot be read as a VAE: {said}") from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error goes back to a file that is not here, and a hub that did not answer."""
    return error is not None and (
        type(error).__name__ == "LocalEntryNotFoundError" or _is_unreachable(error.__context__)
    )


def _single_file(path: Path, own: Any) -> Any:
    """A VAE of one file, or the one inside a checkpoint. Raises UsageError on a pickle or missing weights."""
    from diffusers import AutoencoderKL

    if path.suffix != ".safetensors":
        raise UsageError(f"--vae {path} is no .safetensors file; a pickle can run any code when it is opened")
    read_header(path)  # which says what a broken one is
    with tempfile.TemporaryDirectory() as passing:
        values = {key: value for key, value in own.config.items() if not key.startswith("_")}
        (Path(passing) / "config.json").write_text(json.dumps(values | {"_class_name": "AutoencoderKL"}))
        return AutoencoderKL.from_single_file(
            str(path), config=passing, local_files_only=True, torch_dtype=torch.float32
        )


def settle_vae(pipeline: Any, dtype: str, *, tiling: bool) -> None:
    """Let a pipeline's VAE compute in its own dtype, whatever stands around it. Its weights stay as they are.

    dtype: a key of DTYPES, of autocast: bf16 or fp16 compute so, fp32 leaves any autocast outside. tiling: image by image, and
    in overlapping tiles of at most TILE pixels a side.
    """
    vae, asked = pipeline.components.get("vae"), DTYPES[dtype]
    if vae is None:
        return

    def in_its_own(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(x: torch.Tensor, *args: Any, **options: Any) -> Any:
            device = vae.device.type
            if asked == torch.float32 and not torch.is_autocast_enabled(device):
                return method(x.to(vae.dtype), *args, **options)
            with torch.autocast(device, dtype=asked, enabled=asked != torch.float32):
                return method(x.to(vae.dtype), *args, **options)

        return call

    vae.encode, vae.decode = in_its_own(vae.encode), in_its_own(vae.decode)
    if tiling:
        vae.enable_slicing()
        vae.enable_tiling()
        vae.tile_sample_min_size = side = min(TILE, *np.atleast_1d(vae.config.sample_size).tolist())
        vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
    if tiling or asked != torch.float32:
        pipeline.register_to_config(_vae=f"{dtype}{', tiled' * tiling}")


def skip_last_layers(pipeline: Any, count: int) -> None:
    """Let CLIP's last `count` layers have no part in what a prompt says: diffusers' clip_skip.

    Of Stable Diffusion 1 and 2 they are made to add nothing, which every program that reads the files then follows. SDXL's
    second encoder needs its last layer for the pooled embedding: there the count is noted, and told to the pipeline whenever it
    draws.
    Raises UsageError for a pipeline without CLIP, or a count that leaves no layer.
    """
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}
    if not parts or not all(type(part).__name__.startswith("CLIPText") for part in parts.values()):
        raise UsageError(
            f"--clip-skip is for text encoders that are CLIP's, and a {type(pipeline).__name__} has none; leave it out"
        )
    # SDXL goes without the last one by itself, and counts from there.
    most = min(part.config.num_hidden_layers for part in parts.values()) - len(parts)
    if not 0 <= count <= most:
        raise UsageError(
            f"--clip-skip is {count}; this teacher's text encoder can do without 0 to {most} of its layers"
        )
    if len(parts) > 1:
        pipeline.register_to_config(_clip_skip=count)
        return
    layers = next(part for name, part in parts["text_encoder"].named_modules() if name.endswith("encoder.layers"))
    with torch.no_grad():
        for layer in list(layers)[len(layers) - count :]:
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()


def a1111_clip_skip(count: int, *, is_xl: bool) -> int:
    """Return A1111's number for diffusers' clip_skip: it counts from the layer that is read, for SDXL the last but one."""
    return count + (2 if is_xl else 1)
