"""`lcmdistill info`: describe a teacher, a run or a LoRA from its files. No weights are loaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.config.lora_words import with_loras
from lcmdistill.teachers.folders import WEIGHT_FILE
from lcmdistill.teachers.lora.kinds import FAMILY_KEY, adapter_settings, kinds_of, other_kinds_of
from lcmdistill.teachers.naming import ALIASES, is_local, license_name, license_of, model_hint, resolve_alias
from lcmdistill.teachers.registry import FAMILIES, family_of_class, single_file_layouts
from lcmdistill.teachers.schedulers import is_flow, static_shift
from lcmdistill.teachers.single_file.inspect import (
    LORA_DOWNS,
    VAE,
    Header,
    holds_network,
    inspect_checkpoint,
    is_lora,
    read_header,
)
from lcmdistill.teachers.single_file.other_files import OtherFile, not_safetensors, other_file
from lcmdistill.utils.checksums import verify_checksums
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.redact import redact_word
from lcmdistill.utils.units import counted

Row = tuple[str, str]

RANK_FIRST = (".hada_w1_b", ".lokr_w1_b", ".lokr_w2_b")
"LyCORIS' tensors whose first side is the rank"

LAYER_END = re.compile(r"\.(?:(?:lora|hada|lokr|dora|oft)_.*|alpha|[wb]_norm|diff(?:_b)?|on_input.*|[ab][12]\..*)$")
"what follows a layer's name in LoRAs of any kind"

DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def describe(model: str) -> list[Row]:
    """Return a description of a model as (label, text).

    Args:
        model: A run, a pipeline or LoRA folder, a file, an alias, or a cached hub id.

    Raises:
        UsageError: It is none of these.
        RunError: The hub id is not in the local cache.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _file(path)
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    if (path / "config.toml").is_file():
        return _run(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) == 1:
        return _file(files[0])
    if path.exists():
        raise UsageError(f"{model} is not a run, a diffusers folder or a LoRA")
    return _on_the_hub(model)


def _on_the_hub(model: str) -> list[Row]:

    name = resolve_alias(model)
    if Path(name).is_dir():
        return _pipeline(Path(name))
    if is_local(name):
        raise UsageError(
            f"there is no model {model!r}{model_hint(model)}; specify a folder, a file, a hub id, or one of "
            f"{', '.join(ALIASES)}"
        )
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model_index.json")
    if not isinstance(index, str):
        raise RunError(
            f"{name} is not in the local cache, and info only reads local files; download it first, or specify a folder"
        )
    return [("hub id", name), *_pipeline(Path(index).parent)]


def _file(path: Path) -> list[Row]:
    if path.suffix != ".safetensors":
        other = not_safetensors(path)
        if other is None:
            raise UsageError(
                f"{path} is not a .safetensors file; pickles are not read because opening one can run any code"
            )
        return [("file", str(path)), *_other(other)]
    header = read_header(path)
    if is_lora(header):
        rows = _lora(path, header)
    elif not holds_network(header) and (other := other_file(header.tensors)) is not None:
        rows = [*_other(other), ("weights", _size(header.tensors))]
    else:
        rows = _checkpoint(path, header)
    metadata = [(f"header {key}", _shortened(value)) for key, value in sorted(header.metadata.items())]
    return [("file", str(path)), *rows, *metadata]


def _other(file: OtherFile) -> list[Row]:
    return [("type", file.title), ("use", file.use)]


def _shortened(value: str) -> str:
    """Shorten what is not text to read, such as a thumbnail or a table of tags."""
    return value if len(value) <= 600 else f"{value[:117]}..."


def _checkpoint(path: Path, header: Header) -> list[Row]:
    info = inspect_checkpoint(path, header)
    encoders = tuple(prefix for prefix, _ in info.layout.text_encoders.values())
    network = info.family.network_label
    parts = {network: (info.unet.prefix,), "VAE": (VAE,), "text encoders": encoders}
    held = {
        network: True,
        "VAE": "vae" in info.parts,
        "text encoders": not {*info.layout.text_encoders} - {*info.parts, *info.layout.optional_encoders},
    }
    rows = [("type", "single-file checkpoint"), ("detected as", info.why)]
    for name, starts in parts.items():
        size = _size({key: value for key, value in header.tensors.items() if key.startswith(starts)})
        rows.append((name, size if held[name] else "not in the file; --base MODEL supplies what is missing"))
    return [*rows, ("license", header.metadata.get("modelspec.license", "not specified"))]


def _lora(path: Path, header: Header) -> list[Row]:
    is_down = {k: v[1] for k, v in header.tensors.items() if k.endswith((*LORA_DOWNS, *RANK_FIRST))}
    downs = {key: shape for key, shape in is_down.items() if len(shape) > 1}  # others are damaged
    names = header.tensors
    kinds = kinds_of(names) + other_kinds_of(names)
    adapter = path.with_name("adapter_config.json")
    metadata = header.metadata
    if adapter.is_file():
        kind, config = "peft", _json(adapter)
        alpha, base = config.get("lora_alpha", config.get("alpha")), config.get("base_model_name_or_path")
    elif "lora_adapter_metadata" in metadata:
        kind, config = "diffusers", adapter_settings(metadata, f"{path}")
        alphas = [config[f"{part}.lora_alpha"] for part in ("unet", "transformer") if f"{part}.lora_alpha" in config]
        alpha, base = next(iter(alphas), None), metadata.get("ss_sd_model_name")
    else:
        kind = "kohya" if any(name.startswith("lora_") for name in names) else "diffusers"
        alpha, base = metadata.get("ss_network_alpha"), metadata.get("ss_sd_model_name")
    in_file = "in its tensors" if any(name.endswith(".alpha") for name in names) else "none"
    layers = len({LAYER_END.sub("", name) for name in names}) if kinds else len(downs)
    ranks = sorted({shape[0] for shape in downs.values()})
    widths = {shape[1] for key, shape in downs.items() if re.search(r"attn2[._]to_k", key)}
    fits = {layout.width: layout.title for _, layout in single_file_layouts()}
    guess = next((fits[width] for width in widths if width in fits), "not recognizable from its layers")
    family = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    guess = family.title if family else guess
    unknown = other_kinds_of(names) or ["ComfyUI's model keys"] * any("diffusion_model." in name for name in names)
    use = f"cannot be used here ({', '.join(unknown)}); merge it into its base in ComfyUI or with its own program"
    return [
        ("type", f"LoRA, {''.join(f'{each}, ' for each in kinds)}{kind} keys, on {counted(layers, 'layer')}"),
        ("use", use if unknown else "pass it as --lora to sample, or as --teacher-lora to distill and distill-lora"),
        ("rank", ", ".join(map(str, ranks)) or "none"),
        ("alpha", in_file if alpha is None else str(alpha)),
        ("base", str(base or "not specified")),
        ("fits", metadata.get("modelspec.architecture", guess)),
        ("weights", _size(header.tensors)),
        ("license", metadata.get("modelspec.license", "not specified")),
    ]


def _size(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Return the parameter count and dtypes of some tensors."""
    count, dtypes = 0, set()
    for dtype, shape in tensors.values():
        if dtype.startswith(("F", "BF")):
            size = 1
            for side in shape:
                size *= side
            count += size
            dtypes.add(DTYPES.get(dtype, dtype.lower()))
    return f"{count:,} parameters, {', '.join(sorted(dtypes)) or 'no floats'} on disk"


def _pipeline(folder: Path) -> list[Row]:
    index = _json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    family = family_of_class(kind)
    config = _json(folder / (family.network if family else "unet") / "config.json")
    title = family.describe(kind, config) if family else "not supported"
    rows = [("folder", str(folder)), ("type", f"{kind}: {title}"), *_damage(folder)]
    rows += _denoiser(_json(folder / "scheduler" / "scheduler_config.json"))
    side, vae = config.get("sample_size"), _json(folder / "vae" / "config.json")
    if isinstance(side, int | list) and side:
        factor = family.vae_factor(vae) if family else 1
        sides = {each * factor for each in (side if isinstance(side, list) else [side])}
        rows.append(("resolution", f"{' x '.join(map(str, sorted(sides)))} px"))
    embeds = bool(family and family.embeds_guidance and config.get("guidance_embeds"))
    if "time_cond_proj_dim" in config or embeds:
        has = embeds or config["time_cond_proj_dim"] is not None
        rows.append(("guidance input", "yes: guidance adds no cost" if has else "no"))
    for part in sorted(name for name, value in index.items() if isinstance(value, list) and value and value[0]):
        rows += [(part, text) for text in [_weights(folder / part)] if text]
    return [*rows, ("license", _license(folder))]


def _denoiser(config: Mapping[str, Any]) -> list[Row]:
    if is_flow(config):
        is_dynamic = config.get("use_dynamic_shifting")
        shift = "shift by image size" if is_dynamic else f"shift {static_shift(config):g}"
        schedule = (
            f"rectified flow, {shift}, T = {config.get('num_train_timesteps', 1000)} ({config.get('_class_name')})"
        )
        return [("prediction type", "velocity (flow matching)"), ("schedule", schedule)]
    if "beta_schedule" not in config and "trained_betas" not in config:
        return [("schedule", f"{config.get('_class_name', 'none')}")]
    betas = f"{config.get('beta_schedule')} betas {config.get('beta_start')} to {config.get('beta_end')}"
    betas = "trained betas" if config.get("trained_betas") is not None else betas
    zero = ", zero-terminal SNR" if config.get("rescale_betas_zero_snr") else ""
    spacing = f", {config['timestep_spacing']} spacing" if "timestep_spacing" in config else ""
    schedule = f"{betas}, T = {config.get('num_train_timesteps', 1000)}{zero}{spacing} ({config.get('_class_name')})"
    return [("prediction type", str(config.get("prediction_type", "epsilon"))), ("schedule", schedule)]


def _weights(folder: Path) -> str:
    """Describe a component's weight files; if there are several variants, the one without a suffix."""
    if not folder.is_dir():
        return ""
    named = {path: WEIGHT_FILE.fullmatch(path.name) for path in sorted(folder.glob("*.safetensors"))}
    variants: dict[str, list[Path]] = {}
    for path, match in named.items():
        variants.setdefault((match["variant"] or "") if match else "", []).append(path)
    if not variants:
        pickles = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".ckpt")]
        return "pickled weights (not opened)" if pickles else ""
    chosen = "" if "" in variants else next(iter(variants))
    tensors = {key: value for path in variants[chosen] for key, value in read_header(path).tensors.items()}
    others = [name or "plain" for name in variants if name != chosen]
    text = _size(tensors) + (f"; also {', '.join(others)}" if others else "")
    return text + (f"; needs --variant {chosen}" if chosen else "")


def _license(folder: Path) -> str:
    if name := license_name(license_of(str(folder))):
        return name
    files = [path.name for path in sorted(folder.iterdir()) if path.name.lower().startswith("licen")]
    return f"see {', '.join(files)}" if files else "not specified"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} is not a table of settings; restore the file")
    return tree


def _damage(folder: Path) -> list[Row]:
    """Return a row if a file that a run wrote is missing, or is small and changed."""
    try:
        verify_checksums(folder, largest=2**20)
    except UsageError as error:
        return [("damage", str(error))]
    return []


def _run(folder: Path) -> list[Row]:
    from lcmdistill.config.guidance import omega_range
    from lcmdistill.config.recorded import run_takes_omega
    from lcmdistill.objectives.recorded import has_trained_student, load_run_config
    from lcmdistill.utils.run_dir import checkpoint_step, checkpoints

    config = load_run_config(folder)
    if config is None:
        raise UsageError(f"{folder} is not a run folder: its config.toml belongs to another program")
    method, is_lora_run = config.objective.info, config.student.kind == "lora"
    title = method.lora_title if is_lora_run else method.title
    saved = checkpoints(folder / "checkpoints")
    done, total = (checkpoint_step(saved[-1]) if saved else 0), config.optim.max_train_steps
    omegas = omega_range(config)
    guidance = f"{omegas.omega} (guidance_scale {omegas.scale})" if omegas else "free: CFG and negative prompts work"
    has_pipeline = (folder / "pipeline").is_dir()
    if method.start == "student" and omegas and has_pipeline and not run_takes_omega(folder):
        guidance = "as in the starting model"
    rows = [
        ("run", str(folder)),
        (
            "type",
            f"run: {title} ({method.paper}), {method.relation} {with_loras(config.teacher.model, config.teacher.loras)}",
        ),
        (
            "steps",
            f"{done} of {total}, "
            f"{config.optim.batch_size} x {config.optim.gradient_accumulation_steps} samples per process",
        ),
        ("objective", method.describe(config.objective)),
        ("guidance", guidance),
        *([("clip skip", f"{skip} (diffusers counting)")] if (skip := config.teacher.clip_skip) else []),
        ("data", f"{', '.join(map(redact_word, config.data.sources))}, {config.data.resolution} px"),
        (
            "settings",
            f"learning rate {config.optim.learning_rate}, seed {config.run.seed}, {config.run.precision}",
        ),
    ]
    if not has_trained_student(folder):
        return [*rows, ("result", "none yet; run its distill command again to finish it")]
    if is_lora_run:
        return [
            *rows,
            *_damage(folder / "lora"),
            *(row for path in sorted((folder / "lora").glob("*.safetensors")) for row in _file(path)),
        ]
    return [*rows, *_pipeline(folder / "pipeline")]
