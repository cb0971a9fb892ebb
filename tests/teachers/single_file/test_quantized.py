"""Quantized weights: scales that are not applied are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcmdistill.teachers.overrides import _single_file
from lcmdistill.teachers.single_file.inspect import read_header
from lcmdistill.teachers.single_file.weights import CheckpointFile, Source
from lcmdistill.utils.errors import UsageError

FP8 = torch.ones(64, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ({"weight_scale": torch.ones(8, 8)}, "x.weight is block-scaled fp8"),
        ({"weight_scale": torch.ones(16, 8)}, "x.weight is block-scaled fp8"),
        ({"weight_scale_inv": torch.ones(8, 8)}, "x.weight is quantized"),
    ],
)
def test_block_scales_are_refused(scales: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"x.weight": FP8} | {f"x.{name}": value for name, value in scales.items()}, path)
    file = CheckpointFile(path, read_header(path))
    with pytest.raises(UsageError, match=sentence):
        file.fill(nn.Linear(64, 64, bias=False), {"weight": [Source("x.weight")]}, "U-Net")


def test_a_vae_with_scales_is_refused(tmp_path: Path) -> None:
    path, current = tmp_path / "vae.safetensors", Any
    save_file({"decoder.conv_in.weight": FP8, "decoder.conv_in.scale_weight": torch.ones(1)}, path)
    with pytest.raises(UsageError, match=r"scaled fp8 \(decoder.conv_in.scale_weight\)"):
        _single_file(path, current)
