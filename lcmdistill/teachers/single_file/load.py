"""Load single-file checkpoints, as A1111, ComfyUI and Civitai share them, without a network: the configs are bundled.

diffusers reads the weights. A temporary folder supplies what the file itself lacks: the configs of its layout, CLIP's
vocabulary, and what the keys imply about prediction type, schedule and input channels.
"""

import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from lcmdistill.teachers.compat import dtype_option
from lcmdistill.teachers.single_file.inspect import CheckpointInfo, inspect_checkpoint, read_header
from lcmdistill.utils.errors import UsageError

CONFIGS = Path(str(files("lcmdistill") / "assets" / "configs"))


def load_single_file(path: Path, prediction_type: str | None = None, configs: Path | None = None) -> Any:
    """Load a checkpoint as a diffusers pipeline in fp32 without a safety checker.

    Args:
        path: A .safetensors file.
        prediction_type: Replaces what the file specifies.
        configs: A diffusers folder that replaces the layout's configs.

    Raises:
        UsageError: The file is not a Stable Diffusion checkpoint, or it lacks weights.
    """
    import diffusers
    import torch

    header = read_header(path)
    info = inspect_checkpoint(path, header)
    layout, marker = info.layout, info.layout.marker
    has_flat_keys = layout.flat_text_keys and not any(n.startswith(f"{marker}text_model.") for n in header.tensors)
    pipeline_class: Any = getattr(diffusers, info.family.pipeline_classes[0])
    options = dict(info.family.single_file_options)
    with _config_folder(info, prediction_type, configs or CONFIGS / layout.key) as folder:
        try:
            if has_flat_keys:
                options["text_encoder"] = _flat_text_encoder(path, marker, folder / "text_encoder")
            pipeline = pipeline_class.from_single_file(
                str(path), config=str(folder), local_files_only=True, **dtype_option(torch.float32), **options
            )
        except Exception as error:  # a loader raises whatever it meets in files of another kind
            reason = str(error).strip().split("\n")[0]
            if "meta tensor" in reason:  # a weight that the file lacks
                reason = "weights are missing, or it has fewer blocks than its base (SSD-1B: use its diffusers folder)"
            raise UsageError(f"{path} was detected as {info.why} but could not be loaded: {reason}") from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            missing = [name for name, value in part.named_parameters() if value.is_meta]
            if missing:
                raise UsageError(
                    f"{path} lacks {len(missing)} weights of its {type(part).__name__}, such as {missing[0]}"
                )
    return pipeline


def _flat_text_encoder(path: Path, prefix: str, config: Path) -> Any:
    """Return CLIP in fp32 from keys without the `text_model.` that diffusers expects; missing weights stay on meta.

    Stable Diffusion's first files had such keys, and so have models that were merged from them.
    """
    import torch
    from safetensors import safe_open
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(config)).eval()
    state = {name: torch.empty_like(value, device="meta") for name, value in encoder.state_dict().items()}
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        for name in state:
            if (key := prefix + name.removeprefix("text_model.")) in stored:
                state[name] = file.get_tensor(key).float()
    encoder.load_state_dict(state, assign=True)
    return encoder


@contextmanager
def _config_folder(info: CheckpointInfo, prediction_type: str | None, configs: Path) -> Iterator[Path]:
    """Yield a temporary diffusers folder without weights, with the configs that the file needs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "configs"
        shutil.copytree(configs, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        prediction = prediction_type or info.prediction_type
        scheduler = {"prediction_type": prediction, "rescale_betas_zero_snr": info.zero_snr}
        _change(folder / "scheduler" / "scheduler_config.json", **scheduler)
        unet: dict[str, Any] = {"in_channels": info.family.input_channels, "time_cond_proj_dim": None}
        if configs == CONFIGS / info.layout.key and prediction in info.layout.sample_sizes:
            unet["sample_size"] = info.layout.sample_sizes[prediction]
        _change(folder / "unet" / "config.json", **unet)
        for tokenizer in folder.glob("tokenizer*"):
            if not {"tokenizer.json", "vocab.json"} & {path.name for path in tokenizer.iterdir()}:
                write_vocabulary(tokenizer)
        yield folder


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def write_vocabulary(folder: Path) -> None:
    """Write CLIP's merges.txt, and the vocab.json that follows from it."""
    text = gzip.decompress((CONFIGS / "merges.txt.gz").read_bytes()).decode("utf-8")
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    vocabulary = clip_vocabulary(text.splitlines()[1:])
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )


def clip_vocabulary(merges: Sequence[str]) -> list[str]:
    """Return CLIP's tokens in the order of their ids: bytes, bytes that end a word, merges, and the two markers.

    A printable byte is its own letter; the others take the letters from 256 on (Radford et al. 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    joined = ["".join(merge.split(" ")) for merge in merges]
    return [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
