"""Load single-file checkpoints, as A1111, ComfyUI and Civitai share them, without a network: the configs are bundled.

A temporary folder supplies what the file itself lacks: the configs of its layout, CLIP's vocabulary, and what the keys imply
about prediction type, schedule and input channels.
"""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from lcmdistill.teachers.registry import family_of_class
from lcmdistill.teachers.single_file.inspect import CheckpointInfo, inspect_checkpoint, read_header
from lcmdistill.teachers.single_file.unet_blocks import with_counted_blocks
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

CONFIGS = Path(str(files("lcmdistill") / "assets" / "configs"))


def load_single_file(
    path: Path,
    prediction_type: str | None = None,
    configs: Path | None = None,
    *,
    base: Callable[[], Any] | None = None,
    replaced: Collection[str] = (),
) -> Any:
    """Load a checkpoint as a diffusers pipeline in fp32 without a safety checker.

    Args:
        path: A .safetensors file.
        prediction_type: Replaces what the file specifies.
        configs: A diffusers folder that replaces the layout's configs.
        base: Loads the pipeline that the parts come from which the file lacks.
        replaced: Components that the caller replaces. Those that the file lacks remain on the meta device.

    Raises:
        UsageError: The file is not a Stable Diffusion checkpoint, or it lacks parts or weights.
    """
    header = read_header(path)
    info = inspect_checkpoint(path, header)
    missing = [part for part in info.missing if part not in replaced]
    if base is None and missing:
        options = ["--text-encoder"] * (missing != ["vae"]) + ["--vae"] * ("vae" in missing)
        raise UsageError(
            f"{path} holds no {' and no '.join(missing)}; pass {' and '.join(options)}, or --base MODEL for all parts that it "
            "lacks"
        )
    if base is not None and not info.missing and not info.layout.optional_encoders:
        raise UsageError(f"{path} holds all parts of a pipeline, so --base has no effect; remove the option")
    if base is not None:
        return _onto_base(path, info, base(), prediction_type)
    with _config_folder(info, prediction_type, configs or CONFIGS / info.layout.key) as folder:
        return _assemble(path, info, folder)


def _assemble(path: Path, info: CheckpointInfo, folder: Path) -> Any:
    """Return the pipeline of a diffusers folder without weights, with the parts that a file holds."""
    import diffusers
    import torch
    import transformers

    modules, network = {}, info.family.network
    for part in (
        network,
        "vae",
        *(part for part in info.layout.text_encoders if part not in info.layout.optional_encoders),
    ):
        config = parse_json((folder / part / "config.json").read_text(encoding="utf-8"))
        if part in info.layout.text_encoders:
            modules[part] = _empty(getattr(transformers, config["architectures"][0]), config)
        else:
            config = _network_config(path, info, config) if part == network else {**config, **_vae_scale(info)}
            modules[part] = _empty(getattr(diffusers, config["_class_name"]), config)
    _fill(path, info, modules)
    kind: Any = getattr(diffusers, info.family.pipeline_classes[0])
    pipeline = kind.from_pretrained(str(folder), local_files_only=True, **info.family.single_file_options, **modules)
    for module in modules.values():
        module.eval().requires_grad_(False)
    assert all(isinstance(module, torch.nn.Module) for module in modules.values())
    return pipeline


def _onto_base(path: Path, info: CheckpointInfo, base: Any, prediction_type: str | None) -> Any:
    """Return a base's pipeline with the parts that a file holds. The base's schedule stays unless the file states another."""
    family = family_of_class(type(base).__name__)
    layout = family.layout_of(getattr(base, family.network).config) if family and family.layout_of else None
    if family is None or layout is None or (family.key, layout.key) != (info.family.key, info.layout.key):
        title = layout.title if layout else type(base).__name__
        ours = f"{info.layout.title}{' inpainting' * info.family.takes_mask}"
        title = f"{title}{' inpainting' * bool(layout and family and family.takes_mask)}"
        raise UsageError(f"{path} is {ours} and --base is {title}; use a base of the same kind")
    network = getattr(base, family.network)
    modules = {family.network: _empty(type(network), _network_config(path, info, dict(network.config)))}
    for part in (part for part in info.parts[1:] if getattr(base, part) is not None):  # a base may lack a T5
        config = getattr(base, part).config
        modules[part] = _empty(type(getattr(base, part)), {**config, **_vae_scale(info)} if part == "vae" else config)
    _fill(path, info, modules)
    for module in modules.values():
        module.eval().requires_grad_(False)
    base.register_modules(**modules)
    if info.layout.network_marker:
        return base
    changes = {"prediction_type": prediction_type or info.prediction_type} if info.states_prediction else {}
    changes |= {"prediction_type": prediction_type} if prediction_type else {}
    changes |= {"rescale_betas_zero_snr": True} if info.zero_snr else {}
    base.scheduler = type(base.scheduler).from_config({**base.scheduler.config, **changes})
    return base


def _vae_scale(info: CheckpointInfo) -> dict[str, Any]:
    """Return the scale and the shift in the config of a file's VAE: those that every program assumes."""
    if "vae" not in info.parts:
        return {}
    return {"scaling_factor": info.layout.latent_scale, "shift_factor": info.layout.latent_shift or None}


def _network_config(path: Path, info: CheckpointInfo, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a file's network: the published one, or a base's, with the blocks that the file has."""
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    if info.layout.network_marker:
        from lcmdistill.teachers.single_file.mmdit_keys import mmdit_config

        try:
            counted = mmdit_config(read_header(path).tensors, info.unet.prefix)
        except KeyError as error:
            raise UsageError(
                f"{path} lacks {error.args[0]}, a weight of its transformer; use a complete file"
            ) from error
        return {**config, **counted, "sample_size": config["sample_size"]}
    config |= {"time_cond_proj_dim": None}
    return with_counted_blocks(config, read_header(path).tensors, info.unet)


def _empty(kind: Any, config: Any) -> Any:
    """Return a part of a class without weights.

    Args:
        kind: The class, of diffusers or of transformers.
        config: Its config.
    """
    from lcmdistill.teachers.single_file.weights import without_weights

    if hasattr(kind, "from_config"):
        return without_weights(lambda: kind.from_config(config))
    text = kind.config_class(**config) if isinstance(config, dict) else config
    return without_weights(lambda: kind(text))


def _fill(path: Path, info: CheckpointInfo, modules: dict[str, Any]) -> None:
    """Load the weights of the modules that a file holds. Raises UsageError for weights that are missing or not read."""
    from lcmdistill.teachers.single_file.weights import (
        TEXT_SOURCES,
        CheckpointFile,
        mmdit_sources,
        unet_sources,
        vae_sources,
    )

    file = CheckpointFile(path, read_header(path))
    network = info.family.network
    network_sources = mmdit_sources if info.layout.network_marker else unet_sources
    sources = {network: network_sources(modules[network], info.unet)}
    if "vae" in info.parts:
        sources["vae"] = vae_sources(modules["vae"])
    for part, (prefix, style) in info.layout.text_encoders.items():
        if part in info.parts and part in modules:
            sources[part] = TEXT_SOURCES[style](modules[part], prefix)
    titles = {network: info.family.network_label, "vae": "VAE"}
    for part, each in sources.items():
        file.fill(modules[part], each, titles.get(part, part))
    if info.unet.prefix or not info.layout.network_marker:
        file.refuse_unread(info.unet.prefix, sources[network], titles[network])


@contextmanager
def _config_folder(info: CheckpointInfo, prediction_type: str | None, configs: Path) -> Iterator[Path]:
    """Yield a temporary diffusers folder without weights, with the configs that the file needs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "configs"
        shutil.copytree(configs, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        prediction = prediction_type or info.prediction_type
        if info.layout.network_marker:
            if prediction_type:
                raise UsageError(
                    f"a {info.layout.title} predicts the velocity of flow matching; remove --prediction-type"
                )
            _write_vocabularies(folder)
            yield folder
            return
        scheduler = {"prediction_type": prediction, "rescale_betas_zero_snr": info.zero_snr}
        _change(folder / "scheduler" / "scheduler_config.json", **scheduler)
        unet: dict[str, Any] = {"in_channels": info.family.input_channels, "time_cond_proj_dim": None}
        if configs == CONFIGS / info.layout.key and prediction in info.layout.sample_sizes:
            unet["sample_size"] = info.layout.sample_sizes[prediction]
        _change(folder / "unet" / "config.json", **unet)
        _write_vocabularies(folder)
        yield folder


def _write_vocabularies(folder: Path) -> None:
    for tokenizer in folder.glob("tokenizer*"):
        if not {"tokenizer.json", "vocab.json"} & {path.name for path in tokenizer.iterdir()}:
            write_vocabulary(tokenizer)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**parse_json(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def write_vocabulary(folder: Path) -> None:
    """Write CLIP's merges.txt, and the vocab.json that follows from it."""
    text = gzip.decompress((CONFIGS / "merges.txt.gz").read_bytes()).decode("utf-8")
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    vocabulary = clip_vocabulary(text.splitlines()[1:])
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )


def write_clip_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer, as SD 1 has it: a folder that transformers reads."""
    shutil.copytree(CONFIGS / "sd1" / "tokenizer", folder, dirs_exist_ok=True)
    write_vocabulary(folder)


def clip_vocabulary(merges: Sequence[str]) -> list[str]:
    """Return CLIP's tokens in the order of their ids: bytes, bytes that end a word, merges, and the two markers.

    A printable byte is its own letter; the others take the letters from 256 on (Radford et al. 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    joined = ["".join(merge.split(" ")) for merge in merges]
    return [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
