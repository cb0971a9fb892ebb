"""Load a teacher by alias, folder, file or hub id, and refuse what is incomplete, unsafe or unknown."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcmdistill.objectives.recorded import load_run_config
from lcmdistill.teachers.base import Teacher, make_teacher
from lcmdistill.teachers.compat import dtype_option
from lcmdistill.teachers.family import TeacherFamily, with_tokenizers
from lcmdistill.teachers.folders import PICKLE_VARIABLE, check_folder, pickles_allowed, sharded_pickles
from lcmdistill.teachers.hub_session import HubStalled, limited_waiting
from lcmdistill.teachers.lora.fuse import fuse_loras
from lcmdistill.teachers.naming import ALIASES, is_local, model_hint, resolve_alias
from lcmdistill.teachers.overrides import configure_vae, replace_vae, skip_last_layers
from lcmdistill.teachers.registry import family_of_class, supported_classes
from lcmdistill.teachers.schedulers import is_flow, prepare_flow
from lcmdistill.teachers.single_file.inspect import inspect_checkpoint, read_header
from lcmdistill.teachers.single_file.load import load_single_file
from lcmdistill.teachers.text_encoders import missing_text_weights, replace_text_encoders
from lcmdistill.utils.checksums import verify_checksums
from lcmdistill.utils.errors import Interrupted, RunError, UsageError

MOST_TIMESTEPS, MOST_PIXELS = 100_000, 100_000
"above these, a number in a configuration file is taken for damage"

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
    vae: str | None = None,
    text_encoder: Sequence[str] | None = None,
    base: str | None = None,
    loras: Sequence[str] | None = None,
    lora_checksums: Sequence[str] | None = None,
    vae_dtype: str = "fp32",
    vae_tiling: bool = False,
    clip_skip: int | None = None,
    drop: Sequence[str] | None = None,
) -> Any:
    """Load any diffusers pipeline in fp32.

    Args:
        model: An alias, a local diffusers folder or run, a single file, or a hub id.
        revision: A revision of the hub id.
        variant: The variant of the weight files, such as fp16.
        allow_pickle: Whether to open pickled weights.
        prediction_type: What the network predicts, where its files are wrong or do not specify it.
        vae: A VAE to use instead of the pipeline's own, see `replace_vae`.
        text_encoder: Text encoders to use instead of the pipeline's own, see `replace_text_encoders`.
        base: The model that the parts come from which a single file lacks.
        loras: LoRAs to fuse into the weights, FILE or FILE:SCALE.
        lora_checksums: The SHA-256 that each of their files must have; None accepts any.
        vae_dtype: What the VAE computes in, see `configure_vae`.
        vae_tiling: Whether the VAE works in tiles.
        clip_skip: How many of CLIP's last layers to skip.
        drop: Components to leave out.

    Raises:
        UsageError: There is no such model, it is incomplete, or its weights are pickles.
        RunError: The hub cannot be reached.
    """
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_weight_bar

    # Bars over a handful of local files carry no information; the hub's download bars stay.
    disable_progress_bar()
    disable_weight_bar()
    allow_pickle = allow_pickle or pickles_allowed()
    if base is not None and not _is_file(model):
        raise UsageError(f"--base is for single files that lack parts, and {model} is not a file; remove the option")
    if _is_file(model):
        pipeline = _open_file(model, revision, prediction_type, base, allow_pickle, vae, text_encoder, drop or ())
    else:
        pipeline = _open_pipeline(model, revision, variant, allow_pickle, prediction_type, drop or ())
    pipeline.scheduler = prepare_flow(pipeline.scheduler)
    make_sample_size_plain(pipeline)
    if vae is not None:
        replace_vae(pipeline, vae, allow_pickle=allow_pickle)
    if text_encoder:
        replace_text_encoders(pipeline, text_encoder, allow_pickle=allow_pickle)
    _check_finite(model, pipeline)
    _check_settings(model, pipeline)
    if loras:
        fuse_loras(pipeline, loras, lora_checksums)  # before CLIP's layers are skipped: a LoRA would bring them back
        if (broken := nonfinite_part(pipeline)) is not None:
            raise UsageError(
                f"{model}: the weights of its {broken} overflow with --teacher-lora {', '.join(loras)}; use another file, or a "
                "smaller scale"
            )
    configure_vae(pipeline, vae_dtype, tiling=vae_tiling)
    if clip_skip is not None:
        skip_last_layers(pipeline, clip_skip)
    return pipeline


def _is_file(model: str) -> bool:
    """Return whether a model is a single file. Pickles are refused elsewhere."""
    path = Path(resolve_alias(model)).expanduser()
    return path.is_file() and path.suffix not in PICKLES


def _open_file(
    model: str,
    revision: str | None,
    prediction_type: str | None,
    base: str | None,
    allow_pickle: bool,
    vae: str | None,
    text_encoder: Sequence[str] | None,
    drop: Sequence[str],
) -> Any:
    path = Path(resolve_alias(model)).expanduser()
    if revision is not None:
        raise _no_revisions(model, revision)
    info = inspect_checkpoint(path, read_header(path))
    _check_drop(model, info.family, drop)  # without a base, nothing that can be dropped is read
    encoders = info.layout.text_encoders if text_encoder else ()
    return load_single_file(
        path,
        prediction_type,
        base=None if base is None else lambda: load_pipeline(base, allow_pickle=allow_pickle, drop=drop),
        replaced=[*encoders, *(["vae"] if vae else [])],
    )


def _no_revisions(model: str, revision: str) -> UsageError:
    return UsageError(f"--revision is {revision!r}, and {model} is a local path without revisions; remove the option")


def _open_pipeline(
    model: str,
    revision: str | None,
    variant: str | None,
    allow_pickle: bool,
    prediction_type: str | None,
    drop: Sequence[str],
) -> Any:
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    name = resolve_alias(model)
    local = Path(name).expanduser()
    if revision is not None and local.exists():
        raise _no_revisions(model, revision)
    if (local / "pipeline" / "model_index.json").is_file():
        local = local / "pipeline"  # of a run's folder
    if local.is_dir():
        verify_checksums(local)
        if (
            (local / "lora").is_dir()
            and not (local / "model_index.json").exists()
            and load_run_config(local) is not None
        ):
            raise UsageError(
                f"{local} is a LoRA run; merge it with its base first: lcmdistill export {local} --format fused "
                "--output PATH"
            )
    elif local.suffix in PICKLES:
        raise UsageError(
            f"{model} is a pickle, which can run any code when opened; use a .safetensors file or a diffusers folder"
        )
    elif is_local(name):
        raise UsageError(
            f"there is no model {model!r}{model_hint(model)}; specify an existing diffusers folder or .safetensors "
            f"file, a hub id like owner/name, or one of {', '.join(ALIASES)}"
        )
    dropped: dict[str, Any] = dict.fromkeys(with_tokenizers(drop))
    if "safety_checker" in drop:
        dropped["requires_safety_checker"] = False
    options = {"variant": variant, "use_safetensors": None if allow_pickle else True, **dropped}
    try:
        folder = local if local.is_dir() else _download(name, revision, options)
        index = check_folder(folder, model, variant=variant, allow_pickle=allow_pickle, dropped=dropped)
        _check_drop(model, family_of_class(str(index["_class_name"])), drop)
        options |= dtype_option(torch.float32)
        # diffusers asks for parts by name that a saved pipeline lacks, such as a T5.
        options |= {part: None for part, value in index.items() if value == [None, None]}
        # diffusers finds these only where it knows that all weights are pickles.
        for part in sharded_pickles(folder, index):
            kind = getattr(diffusers, index[part][1])
            options[part] = kind.from_pretrained(folder / part, use_safetensors=False, **dtype_option(torch.float32))
        pipeline = DiffusionPipeline.from_pretrained(str(folder), **options)
    except (UsageError, RunError, Interrupted, MemoryError):
        raise
    except Exception as error:  # libraries raise whatever a damaged file leads them to
        raise _explain_loading(model, local.is_dir(), error) from error
    _check_weights(model, pipeline)
    if prediction_type is not None:
        if is_flow(pipeline.scheduler.config):
            raise UsageError(
                f"{model} was trained with flow matching: its network predicts the velocity, not {prediction_type!r}; remove "
                "--prediction-type"
            )
        pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    if skip := index.get("_clip_skip"):
        pipeline.register_to_config(_clip_skip=skip)  # of a student's pipeline; diffusers does not read this key
    return pipeline


def _check_drop(model: str, family: TeacherFamily | None, drop: Sequence[str]) -> None:
    """Raise UsageError for a text encoder that a pipeline does not work without, or does not have."""
    optional = family.optional_encoders if family else ()
    if unknown := [part for part in drop if part != "safety_checker" and part not in optional]:
        raise UsageError(f"{model} has no {unknown[0]} that can be dropped; remove --drop {unknown[0]}")


def _download(name: str, revision: str | None, options: Mapping[str, Any]) -> Path:
    """Return the folder of a hub model in the local cache, downloaded if needed and if the hub answers."""
    from diffusers import DiffusionPipeline

    try:
        with limited_waiting():
            return Path(DiffusionPipeline.download(name, revision=revision, **options))
    except HubStalled as stalled:
        try:
            return Path(DiffusionPipeline.download(name, revision=revision, local_files_only=True, **options))
        except OSError:
            raise stalled from None


def load_teacher(model: str, **options: Any) -> Teacher:
    """Load the teacher of a distillation; its files decide its family.

    Args:
        model: As for `load_pipeline`.
        options: Those of `load_pipeline`.

    Raises:
        UsageError: As for `load_pipeline`, and for a pipeline class that belongs to no family.
        RunError: The hub cannot be reached.
    """
    pipeline = load_pipeline(model, **options)
    name = type(pipeline).__name__
    family = family_of_class(name)
    if family is None:
        raise UsageError(
            f"{model} is a {name}, which cannot be distilled yet; supported are {', '.join(supported_classes())}"
        )
    vae = pipeline.components.get("vae")
    normalized = [key for key in ("latents_mean", "latents_std") if vae is not None and vae.config.get(key) is not None]
    if normalized:
        raise UsageError(
            f"{model} has a VAE with {normalized[0]}, a scale per channel, which is not applied here; use a teacher with one "
            "scaling factor"
        )
    return make_teacher(family, pipeline)


def checkpoint_summary(model: str, prediction_type: str | None) -> str:
    """Return what a single file was recognized as, in words; "" for a model that is not a single file.

    Args:
        model: As for `load_pipeline`.
        prediction_type: What the user specified, None if nothing.

    Raises:
        UsageError: The file is not a known checkpoint.
    """
    file = Path(resolve_alias(model)).expanduser()
    if not file.is_file() or file.suffix != ".safetensors":
        return ""
    override = f"; used as {prediction_type}, set by --prediction-type" if prediction_type else ""
    return f"{model} is {inspect_checkpoint(file, read_header(file)).why}{override}"


def _check_finite(model: str, pipeline: Any) -> None:
    """Raise UsageError if a weight is NaN or Inf: such a model generates black images, and teaches nothing."""
    if (broken := nonfinite_part(pipeline)) is not None:
        raise UsageError(
            f"{model}: the weights of its {broken} contain NaN or Inf; its training diverged or a file is damaged: use "
            "another checkpoint (for a run: export --weights best)"
        )


def _check_settings(model: str, pipeline: Any) -> None:
    """Raise UsageError for settings in a model's configuration files that its images would be black with, or none at all.

    Infinity is allowed: some schedulers of diffusers have it as a limit.
    """
    import torch

    parts = {name: part for name, part in pipeline.components.items() if hasattr(part, "register_to_config")}
    for name, part in parts.items():
        config = dict(part.config)
        broken = [key for key, value in config.items() if isinstance(value, float) and value != value]
        broken += [key for key, value in vars(part).items() if isinstance(value, torch.Tensor) and value.isnan().any()]
        steps = config.get("num_train_timesteps")  # None: of a U-Net in pixel space
        has_steps = steps is None or (isinstance(steps, int) and 1 <= steps <= MOST_TIMESTEPS)
        broken += ["num_train_timesteps"] * (not has_steps)
        factor = config.get("scaling_factor", 1.0)
        broken += ["scaling_factor"] * (name == "vae" and not _is_number(factor, above=0.0))
        broken += ["shift_factor"] * (name == "vae" and not _is_number(config.get("shift_factor") or 0.0))
        sides = config.get("sample_size") or 1
        sides = sides if isinstance(sides, list | tuple) else [sides]
        broken += ["sample_size"] * any(not isinstance(side, int) or not 1 <= side <= MOST_PIXELS for side in sides)
        if broken:
            value = config.get(broken[0], "NaN")
            raise UsageError(
                f"{model}: {broken[0]} of its {name} is {value!r} in its configuration, which no model can have; restore the "
                "file"
            )


def _is_number(value: Any, above: float = -math.inf) -> bool:
    return isinstance(value, int | float) and above < value < math.inf


def nonfinite_part(pipeline: Any) -> str | None:
    """Return the name of a pipeline's part with a weight that is NaN or Inf; None if there is none."""
    import torch

    for name, part in pipeline.components.items():
        weights = part.parameters() if isinstance(part, torch.nn.Module) else ()
        # A sum is NaN or Inf if one of its terms is, and needs no memory.
        if not all(bool(each.detach().sum(dtype=torch.float32).isfinite()) for each in weights):
            return name
    return None


def make_sample_size_plain(pipeline: Any) -> None:
    """Record a square `sample_size` of [side, side], which diffusers accepts as well, as one number."""
    for part in pipeline.components.values():
        size = getattr(part, "config", {}).get("sample_size") if hasattr(part, "register_to_config") else None
        if isinstance(size, list | tuple) and len(set(size)) == 1:
            part.register_to_config(sample_size=size[0])


def _check_weights(model: str, pipeline: Any) -> None:
    """Raise UsageError if a network, VAE or text encoder is incomplete: the libraries only warn.

    diffusers leaves a missing weight on the meta device. transformers fills it with random values, so a text encoder's
    weights are compared with its files, under the names that its versions use.
    """
    from diffusers import ModelMixin

    for name, part in pipeline.components.items():
        if isinstance(part, ModelMixin):
            missing = [key for key, value in part.state_dict().items() if value.is_meta]
        elif name.startswith("text_encoder") and part is not None:
            missing = missing_text_weights(part)
        else:
            continue
        if missing:
            raise UsageError(
                f"{model} cannot be loaded as a diffusers pipeline: the file of its {name} lacks {len(missing)} weights of "
                f"the right shape, such as {missing[0]}"
            )


def _explain_loading(model: str, is_folder: bool, error: Exception) -> Exception:
    """Return the error to raise for what a library raised while it loaded a model."""
    text = str(error)
    first_line = text.strip().split("\n")[0]
    if isinstance(error, AttributeError) and (
        unknown := re.search(r"diffusers\W+has no attribute \W?(\w+)", first_line)
    ):
        return UsageError(
            f"{model} is a {unknown[1]}, which the installed diffusers does not know; supported are "
            f"{', '.join(supported_classes())}"
        )
    if is_folder:
        return UsageError(f"{model} cannot be loaded as a diffusers pipeline: {first_line}")
    text += str(error.__cause__ or "")  # where older versions of diffusers report the cause
    signs = ("not fully cached", "couldn't connect", "offline")
    unreachable = isinstance(error, HubStalled) or any(sign in text.lower() for sign in signs)
    if unreachable or ("not cached locally" in text and "Not Found" not in text):
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
        return RunError(
            f"{model} is not in the local cache ({HF_HUB_CACHE}) and {reason}; connect, specify a local diffusers folder, "
            "or try --teacher tiny, which needs no network"
        )
    if "not a valid model identifier" in text or "404" in text or "Repository Not Found" in text:
        return UsageError(
            f"there is no model {model!r} on the hub that you can read{model_hint(model)}; check the name, or log in if it "
            "is gated"
        )
    if "safetensors" in text:
        return UsageError(
            f"{model} has no safetensors weights; pass --variant if it has them as fp16 or the like, or --set "
            f"teacher.allow_pickle=true ({PICKLE_VARIABLE}=1 for other commands) if you trust its author"
        )
    return RunError(f"{model} cannot be loaded: {first_line}")
