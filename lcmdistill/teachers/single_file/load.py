"""Single-file checkpoints, as A1111, ComfyUI and Civitai share them, read without a network: the configs ship with the package.

diffusers reads the weights; what the file itself does not hold is put beside it in a passing folder: the configs of its
layout, CLIP's vocabulary, and what the keys say of prediction type, schedule and input channels.
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

from lcmdistill.teachers.single_file.inspect import LAYOUTS, CheckpointInfo, inspect_checkpoint, read_header
from lcmdistill.utils.errors import UsageError

CONFIGS = Path(str(files("lcmdistill") / "assets" / "configs"))


def load_single_file(path: Path, prediction_type: str | None = None, configs: Path | None = None) -> Any:
    """The diffusers pipeline that a checkpoint holds, in fp32, with no safety checker.

    prediction_type: in place of what the file says; configs: a diffusers folder in place of the layout's. Raises UsageError on
    a file that is no Stable Diffusion checkpoint, or lacks weights.
    """
    import diffusers
    import torch

    header = read_header(path)
    found = inspect_checkpoint(path, header)
    start = LAYOUTS["sd1"][0]
    of_2022 = found.layout == "sd1" and not any(name.startswith(f"{start}text_model.") for name in header.tensors)
    kind = "StableDiffusionXL" if found.layout == "sdxl" else "StableDiffusion"
    pipeline_class: Any = getattr(diffusers, f"{kind}{'Inpaint' * found.inpaints}Pipeline")
    given: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if found.layout != "sdxl":
        given |= {"safety_checker": None, "requires_safety_checker": False}
    with _config_folder(found, prediction_type, configs or CONFIGS / found.layout) as folder:
        try:
            if of_2022:
                given["text_encoder"] = _text_encoder_of_2022(path, start, folder / "text_encoder")
            pipeline = pipeline_class.from_single_file(
                str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float32, **given
            )
        except Exception as error:  # a loader that is fed something else raises whatever it stumbles over
            said = str(error).strip().split("\n")[0]
            if "meta tensor" in said:  # which is what a weight is that was found nowhere
                said = "weights are missing, or there are fewer blocks than in its base (SSD-1B: give its diffusers folder)"
            raise UsageError(f"{path} looks like {found.why} and cannot be read as one: {said}") from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            lost = [name for name, value in part.named_parameters() if value.is_meta]
            if lost:
                raise UsageError(f"{path} lacks {len(lost)} weights of its {type(part).__name__}, such as {lost[0]}")
    return pipeline


def _text_encoder_of_2022(path: Path, start: str, config: Path) -> Any:
    """CLIP from keys without the `text_model.` that diffusers looks for, in fp32; what the file lacks is left on meta.

    Stable Diffusion's keys were so at first, and what was merged of that year's models is so still.
    """
    import torch
    from safetensors import safe_open
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(config)).eval()
    state = {name: torch.empty_like(value, device="meta") for name, value in encoder.state_dict().items()}
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        for name in state:
            if (key := start + name.removeprefix("text_model.")) in stored:
                state[name] = file.get_tensor(key).float()
    encoder.load_state_dict(state, assign=True)
    return encoder


@contextmanager
def _config_folder(found: CheckpointInfo, prediction_type: str | None, configs: Path) -> Iterator[Path]:
    """A passing diffusers folder without weights, as the file needs it."""
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing) / "configs"
        shutil.copytree(configs, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        prediction = prediction_type or found.prediction_type
        scheduler = {"prediction_type": prediction, "rescale_betas_zero_snr": found.zero_snr}
        _change(folder / "scheduler" / "scheduler_config.json", **scheduler)
        _change(folder / "unet" / "config.json", in_channels=9 if found.inpaints else 4, time_cond_proj_dim=None)
        if configs == CONFIGS / "sd2" and prediction == "epsilon":
            _change(folder / "unet" / "config.json", sample_size=64)  # the bases of 512 px
        for tokenizer in folder.glob("tokenizer*"):
            if not {"tokenizer.json", "vocab.json"} & {path.name for path in tokenizer.iterdir()}:
                write_vocabulary(tokenizer)
        yield folder


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def write_vocabulary(folder: Path) -> None:
    """CLIP's merges.txt, and the vocab.json that follows from it."""
    text = gzip.decompress((CONFIGS / "merges.txt.gz").read_bytes()).decode("utf-8")
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    vocabulary = clip_vocabulary(text.splitlines()[1:])
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )


def clip_vocabulary(merges: Sequence[str]) -> list[str]:
    """CLIP's tokens in the order of their numbers: bytes, bytes that end a word, merges, and the two marks.

    A byte stands as a letter that can be seen; those that are none take the letters from 256 on (Radford et al. 2019).
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in seen] + [chr(256 + i) for i in range(256 - len(seen))]
    joined = ["".join(merge.split(" ")) for merge in merges]
    return [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
