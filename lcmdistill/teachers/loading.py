"""Teachers: a trained pipeline found by name, folder or hub id, as networks that speak (x0, eps)."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.inpaint import stable_diffusion_inpainting, stable_diffusion_xl_inpainting
from lcmdistill.teachers.naming import ALIASES, is_local, resolve_alias
from lcmdistill.teachers.overrides import replace_vae, settle_vae, skip_last_layers
from lcmdistill.teachers.pixart import pixart_alpha
from lcmdistill.teachers.pixel import pixel_space
from lcmdistill.teachers.sd import stable_diffusion
from lcmdistill.teachers.sdxl import stable_diffusion_xl
from lcmdistill.teachers.single_file.inspect import inspect_checkpoint, read_header
from lcmdistill.teachers.single_file.load import load_single_file
from lcmdistill.utils.errors import RunError, UsageError

# The pipeline class that model_index.json names -> the family's constructor.
FAMILIES: dict[str, Callable[[Any], Teacher]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "LatentConsistencyModelPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "DDPMPipeline": pixel_space,
    "DDIMPipeline": pixel_space,
    "ConsistencyModelPipeline": pixel_space,
    "StableDiffusionInpaintPipeline": stable_diffusion_inpainting,
    "StableDiffusionXLInpaintPipeline": stable_diffusion_xl_inpainting,
    "PixArtAlphaPipeline": pixart_alpha,
}


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
    vae: str | None = None,
    vae_dtype: str = "fp32",
    vae_tiling: bool = False,
    clip_skip: int | None = None,
    drop: Sequence[str] | None = None,
) -> Any:
    """Any diffusers pipeline, in fp32, from an alias, a local diffusers folder or single file, or a hub id.

    prediction_type: what the network predicts, where its files are wrong or do not say; vae, vae_dtype, vae_tiling, clip_skip:
    as in `pieces`; drop: parts to leave out. Raises UsageError if there is no such model or its weights are pickles, RunError
    if the hub cannot be reached.
    """
    pipeline = _opened(model, revision, variant, allow_pickle, prediction_type, drop or ())
    if vae is not None:
        replace_vae(pipeline, vae, allow_pickle=allow_pickle)
    settle_vae(pipeline, vae_dtype, tiling=vae_tiling)
    if clip_skip is not None:
        skip_last_layers(pipeline, clip_skip)
    return pipeline


def _opened(
    model: str,
    revision: str | None,
    variant: str | None,
    allow_pickle: bool,
    prediction_type: str | None,
    drop: Sequence[str],
) -> Any:
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_weight_bar

    # Bars over a handful of local files say nothing; the hub's own download bars stay.
    disable_progress_bar()
    disable_weight_bar()
    name = resolve_alias(model)
    local = Path(name).expanduser()
    if revision is not None and local.exists():
        raise UsageError(
            f"--revision is {revision!r}, and {model} lies on this disk, where models have no revisions; leave it out"
        )
    if (local / "pipeline" / "model_index.json").is_file():
        local = local / "pipeline"  # of a run's folder
    if local.is_dir():
        _check_folder(local, allow_pickle)
        name = str(local)
    elif local.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UsageError(
            f"{model} is a pickle, which can run any code when it is opened; give a .safetensors file or a diffusers folder"
        )
    elif local.is_file():
        return load_single_file(local, prediction_type)
    elif is_local(name):
        raise UsageError(
            f"there is no model {model!r}; give an existing diffusers folder or .safetensors file, a hub id like owner/name, "
            f"or one of {', '.join(ALIASES)}"
        )
    left_out: dict[str, Any] = dict.fromkeys(drop)
    if "safety_checker" in drop:
        left_out["requires_safety_checker"] = False
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            name,
            revision=revision,
            variant=variant,
            use_safetensors=None if allow_pickle else True,
            torch_dtype=torch.float32,
            **left_out,
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        raise _explain_loading(model, local.is_dir(), error) from error
    _check_weights(model, pipeline)
    if prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    if local.is_dir() and (noted := json.loads((local / "model_index.json").read_text("utf-8")).get("_clip_skip")):
        pipeline.register_to_config(_clip_skip=noted)  # of a student's pipeline; diffusers leaves it in the file
    return pipeline


def load_teacher(model: str, **options: Any) -> Teacher:
    """The teacher of a distillation; its family is read from its files. options and errors: those of `load_pipeline`, and
    UsageError on a pipeline class that is not in FAMILIES."""
    pipeline = load_pipeline(model, **options)
    kind = type(pipeline).__name__
    if kind not in FAMILIES:
        raise UsageError(f"{model} is a {kind}, which cannot be distilled yet; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind](pipeline)


def checkpoint_summary(model: str, prediction_type: str | None) -> str:
    """In words, how a single file was recognised; "" of a model that is none. Raises UsageError on one that is unknown."""
    file = Path(resolve_alias(model)).expanduser()
    if not file.is_file() or file.suffix != ".safetensors":
        return ""
    told = f"; taken for {prediction_type}, as --prediction-type says" if prediction_type else ""
    return f"{model} is {inspect_checkpoint(file, read_header(file)).why}{told}"


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    index = folder / "model_index.json"
    if (folder / "lora").is_dir() and (folder / "config.toml").is_file():
        raise UsageError(
            f"{folder} is a LoRA's run; write it with its base first: lcmdistill export {folder} --format fused --output PATH"
        )
    if not index.is_file():
        raise UsageError(f"{folder} holds no model_index.json; a diffusers pipeline folder has one at its top")
    try:
        tree = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{index} is not valid JSON: {error}") from error
    if not isinstance(tree, dict) or "_class_name" not in tree:
        raise UsageError(f"{index} does not describe a diffusers pipeline: it names no _class_name")
    parts = {key for key, value in tree.items() if isinstance(value, list) and value and value[0]}
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise UsageError(f"{folder} is incomplete: model_index.json names {', '.join(missing)}, which is not there")
    for part in sorted({"unet", "transformer", "vae", "text_encoder", "text_encoder_2"} & parts):
        found = {path.suffix for path in (folder / part).iterdir()}
        if ".safetensors" not in found and found & {".bin", ".pt", ".ckpt"} and not allow_pickle:
            raise UsageError(
                f"{folder / part} holds pickled weights only, which can run any code when opened; convert them to "
                "safetensors, or pass --set teacher.allow_pickle=true if you trust their author"
            )


def _check_weights(model: str, pipeline: Any) -> None:
    """Raise UsageError if the file of a network, VAE or text encoder lacks weights: the libraries draw random ones, or leave
    them out, and only warn."""
    for name, part in pipeline.components.items():
        if not type(part).__name__.startswith(("CLIPText", "T5Encoder", "UNet", "PixArt", "Autoencoder")):
            continue
        found: dict[str, list[int]] = {}
        for path in Path(part.config._name_or_path).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                found |= {key.removeprefix("text_model."): file.get_slice(key).get_shape() for key in keys}
        state = {key.removeprefix("text_model."): value for key, value in part.state_dict().items()}
        if type(part).__name__.startswith("Autoencoder"):  # old files of which have other names for some weights
            lost = [key for key, value in state.items() if value.is_meta]
        else:
            # By their memory, since T5's embeddings have two names.
            here = {value.data_ptr() for key, value in state.items() if found.get(key) == list(value.shape)}
            lost = [key for key, value in state.items() if value.data_ptr() not in here]
        if found and lost:
            raise UsageError(
                f"{model} cannot be loaded as a diffusers pipeline: the file of its {name} lacks {len(lost)} weights of "
                f"the right shape, such as {lost[0]}"
            )


def _explain_loading(model: str, is_folder: bool, error: Exception) -> Exception:
    text = str(error)
    first = text.strip().split("\n")[0]
    if isinstance(error, AttributeError) and (unknown := re.search(r"diffusers\W+has no attribute \W?(\w+)", first)):
        return UsageError(
            f"{model} is a {unknown[1]}, which the installed diffusers does not know; supported are {', '.join(FAMILIES)}"
        )
    if is_folder:
        return UsageError(f"{model} cannot be loaded as a diffusers pipeline: {first}")
    text += str(error.__cause__ or "")  # where older versions of diffusers tell what happened
    unreached = "not fully cached" in text or "couldn't connect" in text.lower() or "offline" in text.lower()
    if unreached or ("not cached locally" in text and "Not Found" not in text):
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
        return RunError(
            f"{model} is not in the local cache ({HF_HUB_CACHE}) and {why}; connect, give a local diffusers folder, "
            "or try --teacher tiny, which needs no network"
        )
    if "not a valid model identifier" in text or "404" in text or "Repository Not Found" in text:
        return UsageError(f"the hub has no model {model!r} that you may read; check the name, or log in if it is gated")
    if "safetensors" in text:
        return UsageError(f"{model} has no safetensors weights; pass --set teacher.allow_pickle=true if you trust it")
    return RunError(f"{model} cannot be loaded: {first}")
