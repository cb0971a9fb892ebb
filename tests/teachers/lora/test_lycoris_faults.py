"""Faults of LoRA files: one sentence that says what is wrong, or the right axis."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcmdistill.teachers.lora.files import check_fit
from lcmdistill.teachers.lora.lycoris import _decomposed, _merged
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.utils.errors import UsageError


def test_magnitudes_without_axes_are_per_output() -> None:
    weight, magnitude = torch.randn(4, 4), torch.rand(4) + 1
    assert torch.equal(_decomposed(weight, magnitude), _decomposed(weight, magnitude[:, None]))
    with pytest.raises(RuntimeError, match="3 magnitudes for 4 outputs"):
        _decomposed(weight, magnitude[:3])


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ({"diff_b": torch.ones(4)}, "changes the bias of attn, which has none"),
        (
            {"dora_scale": torch.ones(4, 1), "lora_up.weight": torch.ones(4, 2)},
            "damaged: attn lacks its lora_down.weight",
        ),
    ],
)
def test_faulty_layers_are_refused_in_words(layer: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _merged(nn.Linear(4, 4, bias=False), layer, "attn", "FILE", 1.0)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_mid.oft_blocks", " of OFT"),
        ("lora_unet_mid.oft_diag", " of OFT"),
        ("lora_unet_mid.on_input", " of (IA)^3"),
        ("lora_unet_mid.a1.weight", " of GLoRA"),
        ("diffusion_model.mid.lora_A.weight", " with ComfyUI's model keys"),
    ],
)
def test_other_adapters_are_named_with_a_key(key: str, kind: str) -> None:
    pipeline: Any = SimpleNamespace()
    with pytest.raises(UsageError) as error:
        check_fit(pipeline, FAMILIES["sd"], {key: torch.ones(2, 2)}, "FILE")
    assert f"tensors{kind} such as {key}" in str(error.value)
