"""How `--teacher-lora` spells a LoRA and its scale. No torch."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.redact import public_word, redact_word


class LoraWord(NamedTuple):
    """A LoRA and its scale, as `FILE` or `FILE:SCALE` names them."""

    path: str
    scale: float

    @property
    def name(self) -> str:
        """Its name without local folders."""
        return re.split(r"[/\\]", public_word(self.path).rstrip("/\\"))[-1]

    @property
    def public(self) -> str:
        """Its name and its scale: "style.safetensors (0.8)"."""
        return f"{self.name} ({self.scale:g})"


def split_lora(word: str) -> LoraWord:
    r"""Return the file and the scale of `FILE` or `FILE:SCALE`.

    The colon of a drive (`C:\style.safetensors`), of a URL, or inside of a file's name does not begin a scale.

    Raises:
        UsageError: The scale is not a number, or the word is empty or a URL.
    """
    if "://" in word:
        raise UsageError(f"--teacher-lora {redact_word(word)} is a URL; download the file, and pass its path")
    path, colon, scale = word.rpartition(":")
    is_part_of_path = re.search(r"[/\\]|\.safetensors$", scale) or re.fullmatch("[A-Za-z]", path)
    if not colon or is_part_of_path:
        path, scale = word, "1"
    if not path.strip():
        raise UsageError(
            f"--teacher-lora {word!r} names no file; pass FILE or FILE:SCALE, such as style.safetensors:0.8"
        )
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--teacher-lora {word}: the scale is {scale!r} and must be a number, such as {path}:0.8")
    return LoraWord(path, value)


def with_loras(model: str, loras: Sequence[str] | None) -> str:
    """Return a teacher's name with the LoRAs that are fused into it: "sd15 with style.safetensors (0.8)"."""
    return f"{model} with {lora_names(loras)}" if loras else model


def lora_names(loras: Sequence[str] | None) -> str:
    """Return the public names and scales of LoRAs: "style.safetensors (0.8) and face.safetensors (1)"."""
    return " and ".join(split_lora(word).public for word in loras or ())
