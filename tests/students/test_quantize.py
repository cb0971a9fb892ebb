"""LoRAs on a quantized base: what is quantized, what it saves, and that training follows the plain base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lcmdistill.config.schema import RunConfig
from lcmdistill.students.quantize import (
    QuantizedLinear,
    base_linears,
    check_quantization,
    quantize_base,
    saved_bytes,
)
from lcmdistill.training.memory.estimate import Breakdown
from lcmdistill.training.memory.plan import choose_plan
from lcmdistill.utils.errors import UsageError
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL
from tests.support.training import losses


class Network(nn.Module):
    """A linear layer with an adapter, one that is too narrow, a convolution, and layers that embed the time."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        to_q = {"base_layer": nn.Linear(64, 32), "lora_A": nn.ModuleDict({"online": nn.Linear(64, 16, bias=False)})}
        block = {"to_q": nn.ModuleDict(to_q), "narrow": nn.Linear(64, 4), "conv": nn.Conv2d(16, 16, 3)}
        self.blocks = nn.ModuleList([nn.ModuleDict({**block, "time_emb_proj": nn.Linear(64, 32)})])
        self.time_embedding = nn.Linear(64, 64)


def test_only_linear_layers_of_the_base_s_repeated_blocks_are_quantized() -> None:
    network = Network()
    assert [path for path, _ in base_linears(network)] == ["blocks.0.to_q.base_layer"]
    assert saved_bytes(network, "int8", 4) == 64 * 32 * 3 - 32 * 4
    assert saved_bytes(network, "fp8", 2) == 64 * 32 - 32 * 2
    assert saved_bytes(network, "nf4", 2) == 64 * 32 * 2 - int(64 * 32 * 4.5 / 8)


def test_a_kind_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("none", "int8", "fp8"):
        check_quantization(kind)
    with pytest.raises(
        UsageError,
        match=r"--quantize-base nf4 needs bitsandbytes: pip install 'lcmdistill\[quantize\]', or use .* int8",
    ):
        check_quantization("nf4")


def test_it_is_the_last_resort_of_the_memory_plan() -> None:
    def needed(config: RunConfig) -> Breakdown:
        frozen = 400 if config.student.quantize_base == "int8" else 800
        moments = 100 if config.optim.optimizer == "adamw8bit" else 400
        return Breakdown(0, 0, frozen, 0, 0, 0, moments, 300 - 100 * config.run.gradient_checkpointing)

    config = resolve({}, {"student.kind": "lora", "optim.batch_size": 1, "optim.gradient_accumulation_steps": 1})
    options = {"allow_8bit": True, "allow_int8": True}
    assert choose_plan(config, needed, 1100, **options).config.student.quantize_base == "none"
    plan = choose_plan(config, needed, 1050, **options)
    assert plan.config.student.quantize_base == "int8"
    assert any("change by the rounding" in change for change in plan.changes)
    full = resolve({}, {"optim.batch_size": 1, "optim.gradient_accumulation_steps": 1})
    assert choose_plan(full, needed, 1050, **options).config.student.quantize_base == "none"


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantizedLinear]:
    """A layer of random weights, and the same layer quantized."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = nn.Linear(640, 96).to(dtype).requires_grad_(False)
    return layer, QuantizedLinear(layer, kind)


@pytest.mark.parametrize(("kind", "rounding"), [("int8", 0.004), ("fp8", 0.026), ("nf4", 0.09)])
def test_weights_are_rounded_as_their_format_does_and_gradients_pass(kind: str, rounding: float) -> None:
    """The root mean square of the relative error that each format has on evenly distributed weights."""
    layer, rounded = quantized(kind)
    decoded = rounded.decoded(torch.float32)
    assert float((decoded - layer.weight).norm() / layer.weight.norm()) == pytest.approx(rounding, rel=0.15)
    plain = nn.Linear(640, 96).requires_grad_(False)
    plain.weight.copy_(decoded)
    plain.bias.copy_(layer.bias)
    x = torch.randn(2, 3, 640).requires_grad_()
    torch.testing.assert_close(rounded(x), plain(x))
    found, expected = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (rounded, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_layers_compute_in_autocast_s_dtype_and_keep_no_decoded_weights(kind: str) -> None:
    layer, rounded = quantized(kind, torch.bfloat16)
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 640).requires_grad_()  # in fp32, as after a norm
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value),
    ):
        outputs = [rounded(x)]
        assert not kept
        outputs.append(layer(x))
    assert [each.dtype for each in outputs] == [torch.bfloat16] * 2
    assert torch.autograd.grad(outputs[0].float().sum(), x)[0].dtype == torch.float32


def test_only_adapters_have_gradients_and_weights_of_zeros_stay_zeros() -> None:
    network = Network().requires_grad_(False)
    layer = network.get_submodule("blocks.0.to_q.base_layer")
    layer.get_parameter("weight")[0] = 0
    quantize_base(network, "int8")
    assert type(network.get_submodule("blocks.0.to_q.lora_A.online").weight) is nn.Parameter
    rounded: Any = network.get_submodule("blocks.0.to_q.base_layer")
    assert not rounded.decoded(torch.float32)[0].any()
    assert not any(parameter.requires_grad for parameter in rounded.parameters())
    assert not list(rounded.buffers())  # DDP would send them at each step


def curve(teacher: Path, images: Path, output: Path, kind: str, steps: int) -> list[float]:
    settings = {**SMALL, "teacher.model": str(teacher), "data.sources": (str(images),), "run.output": str(output)}
    settings |= {"student.kind": "lora", "student.rank": 4, "student.quantize_base": kind}
    settings |= {"optim.max_train_steps": steps, "run.checkpoint_every": steps, "optim.learning_rate": 1e-4}
    return losses(distill(resolve({}, settings)))


def test_a_lora_trains_on_an_int8_base_and_is_written_as_usual(
    small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    plain, rounded = (curve(small_teacher, image_folder, tmp_path / kind, kind, steps=2) for kind in ("none", "int8"))
    assert rounded == pytest.approx(plain, rel=0.02)
    assert rounded != plain
    one, other = (load_file(tmp_path / kind / "lora" / f"{kind}.safetensors") for kind in ("none", "int8"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}


def decode_again(network: Any, kind: str) -> None:
    """Round the base's weights as `quantize_base` does, and store them in plain layers."""
    for _, layer in base_linears(network):
        layer.weight.data = QuantizedLinear(layer, kind).decoded(layer.weight.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("fp8", 0.1), ("nf4", 0.25)])
def test_a_loss_curve_is_that_of_the_rounded_weights(
    kind: str,
    tolerance: float,
    small_teacher: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """50 steps. Losses are those of a plain base with the same rounded weights, so nothing but the rounding changes them.

    The rounding moves them as far as its error: 4 bits change the weights of the small random teacher by 9 %.
    """
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    plain = curve(small_teacher, image_folder, tmp_path / "none", "none", steps=50)
    rounded = curve(small_teacher, image_folder, tmp_path / kind, kind, steps=50)
    assert rounded == pytest.approx(plain, rel=tolerance)
    monkeypatch.setattr("lcmdistill.students.build.quantize_base", decode_again)
    assert rounded == pytest.approx(curve(small_teacher, image_folder, tmp_path / "again", kind, steps=50), rel=1e-3)
