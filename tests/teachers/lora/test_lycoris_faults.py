"""Faults of LoRA files: one sentence that says what is wrong, or the right axis."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcmdistill.teachers.lora.checks import check_fit, check_type
from lcmdistill.teachers.lora.files import _peft_alpha, kohya_form
from lcmdistill.teachers.lora.lycoris import _check_layer, _decomposed, _merged
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
        ({"lokr_w1": torch.tensor(1.0), "lokr_w2": torch.ones(4, 4)}, "attn has tensors of other shapes"),
        ({"diff": torch.ones(2, 8)}, "attn has tensors of other shapes .2 outputs for 4"),
        ({"diff": torch.ones(4, 4), "dora_scale": torch.tensor(1.0)}, "attn has tensors of other shapes"),
        ({"diff": torch.ones(4, 4), "dora_scale": torch.ones(1, 4, 1)}, "attn has tensors of other shapes"),
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


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "is a checkpoint and no LoRA; pass it as the model instead"),
        ("first_stage_model.decoder.conv_in.weight", "is a VAE; pass it as --vae"),
        ("controlnet_mid_block.weight", "is a ControlNet; cannot be used here"),
    ],
)
def test_a_file_that_is_no_lora_is_named_as_what_it_is(key: str, what: str) -> None:
    pipeline: Any = SimpleNamespace()
    with pytest.raises(UsageError, match=f"^FILE {what}"):
        check_fit(pipeline, FAMILIES["sd"], {key: torch.ones(2, 2)}, "FILE")


@pytest.mark.parametrize(
    ("ends", "sentence"),
    [
        (
            ["diff", "lora_up.weight", "lora_down.weight"],
            "two changes of one weight, full differences and LoRA of attn",
        ),
        (["hada_w1_a", "lokr_w1", "alpha"], "two changes of one weight, LoHa and LoKr of attn"),
        (["alpha"], "damaged: attn has nothing but alpha"),
        (["dora_scale", "alpha"], "damaged: attn has nothing but alpha and dora_scale"),
        (["diff_b", "alpha"], None),
        (["lora_up.weight", "lora_down.weight", "dora_scale", "diff_b", "alpha"], None),
    ],
)
def test_no_change_of_a_layer_is_lost(ends: list[str], sentence: str | None) -> None:
    layer = dict.fromkeys(ends, torch.ones(4, 4))
    if sentence is None:
        _check_layer("attn", layer, "FILE")
    else:
        with pytest.raises(UsageError, match=sentence):
            _check_layer("attn", layer, "FILE")


@pytest.mark.parametrize(
    ("end", "value", "sentence"),
    [
        ("alpha", torch.tensor([1.0, 2.0]), "damaged: x.alpha is not one number"),
        ("alpha", torch.tensor(True), "damaged: x.alpha is not one number"),
        ("alpha", torch.tensor(2 + 1j), "damaged: x.alpha is not one number"),
        ("alpha", torch.tensor(0.0), "an alpha of 0, x.alpha"),
        (
            "lora_down.weight",
            torch.ones(2, 2, dtype=torch.int8),
            "weights of the type int8, such as x.lora_down.weight",
        ),
        ("lora_A.weight", torch.ones(2, 2, dtype=torch.complex64), "weights of the type complex64"),
        ("dora_scale", torch.ones(2, dtype=torch.int32), "weights of the type int32"),
        ("alpha", torch.tensor([4]), None),
        ("on_input", torch.tensor(True), None),  # of a kind that is refused by its name
    ],
)
def test_numbers_of_another_kind_are_refused(end: str, value: Tensor, sentence: str | None) -> None:
    if sentence is None:
        check_type(f"x.{end}", value, "FILE")
    else:
        with pytest.raises(UsageError, match=sentence):
            check_type(f"x.{end}", value, "FILE")


LAYER = {"lora_unet_to_q.lora_down.weight": torch.ones(2, 4), "lora_unet_to_q.lora_up.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            {"lora_unet_to_q.lora_up.weight": torch.ones(4, 3)},
            r"lora_down.weight has the rank 2, and .*lora_up.weight has 3",
        ),
        ({"lora_unet_to_q.lora_down.weight": torch.ones(4)}, r"lora_down.weight has 1 dimensions"),
        ({"unet.to_q.lora_A.weight": torch.ones(2, 4)}, r"a layer twice, under two names, such as unet.to_q.lora_A"),
        (
            {"lora_unet_to_k.alpha": torch.tensor(1.0)},
            r"1 tensors beyond plain LoRA layers, such as lora_unet_to_k.alpha",
        ),
    ],
)
def test_matrices_that_do_not_belong_together_are_refused(more: dict[str, Tensor], sentence: str) -> None:
    pipeline: Any = SimpleNamespace(unet=nn.ModuleDict({"to_q": nn.Linear(4, 4)}))
    check_fit(pipeline, FAMILIES["sd"], LAYER, "FILE")
    with pytest.raises(UsageError, match=sentence):
        check_fit(pipeline, FAMILIES["sd"], LAYER | more, "FILE")


def test_a_layer_under_two_names_is_refused_in_other_layouts() -> None:
    twice = LAYER | {"unet.to_q.lora_A.weight": torch.ones(2, 4), "lora_unet_to_q.dora_scale": torch.ones(4, 1)}
    with pytest.raises(UsageError, match=r"a layer twice, under two names, such as unet\.to_q\.lora_A"):
        kohya_form(FAMILIES["sd"], twice, {}, "FILE")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "many"},
        {"lora_alpha": 1, "alpha_pattern": [1]},
        {"lora_alpha": 1, "alpha_pattern": {"to_q": None}},
        {"lora_alpha": 1, "alpha_pattern": {"(": 2}},
    ],
)
def test_settings_without_an_alpha_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"FILE has adapter settings without a usable alpha for to_q"):
        _peft_alpha(config, "to_q", 4, "FILE")


def test_peft_s_keys_without_its_settings_are_refused() -> None:
    pipeline: Any = SimpleNamespace()
    key = "base_model.model.mid.to_q.lora_A.weight"
    with pytest.raises(UsageError, match=rf"peft's keys, such as {key}, and no adapter_config.json .* whole folder"):
        check_fit(pipeline, FAMILIES["sd"], {key: torch.ones(2, 2)}, "FILE")
