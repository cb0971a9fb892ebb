"""LoRAs on a quantized base: what is quantized, what it saves, and that training follows the plain base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lcmdistill.config.schema import RunConfig
from lcmdistill.students.quantize import base_linears, check_quantization, quantize_base, saved_bytes
from lcmdistill.training.memory.estimate import Breakdown
from lcmdistill.training.memory.plan import choose_plan
from lcmdistill.utils.errors import UsageError
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL
from tests.support.training import losses


class Network(nn.Module):
    """A linear layer with an adapter, one that is too narrow, and a convolution."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.ModuleDict(
            {"base_layer": nn.Linear(64, 32), "lora_A": nn.ModuleDict({"online": nn.Linear(64, 16, bias=False)})}
        )
        self.narrow, self.conv = nn.Linear(64, 4), nn.Conv2d(16, 16, 3)


def test_only_the_linear_layers_of_the_base_are_quantized() -> None:
    network = Network()
    assert [path for path, _ in base_linears(network)] == ["to_q.base_layer"]
    assert saved_bytes(network, "int8", 4) == 64 * 32 * 3 - 32 * 4
    assert saved_bytes(network, "nf4", 2) == 64 * 32 * 2 - int(64 * 32 * 4.5 / 8)


def test_a_kind_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcmdistill.students.quantize.can_quantize", lambda kind: False)
    check_quantization("none")
    with pytest.raises(
        UsageError, match=r"--quantize-base nf4 needs bitsandbytes: pip install 'lcmdistill\[quantize\]'"
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


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_are_rounded_and_gradients_pass(kind: str) -> None:
    pytest.importorskip("torchao")
    network = Network().requires_grad_(False)
    layer = network.get_submodule("to_q.base_layer")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = layer(x).detach()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    quantize_base(network, kind)
    assert type(network.get_submodule("to_q.lora_A.online").weight) is nn.Parameter
    after = layer(x)
    assert 0 < float((after.detach() - before).abs().max()) < (0.02 if kind == "int8" else 0.1)
    (found,) = torch.autograd.grad(after.sum(), x)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


def curve(teacher: Path, images: Path, output: Path, kind: str, steps: int) -> list[float]:
    settings = {**SMALL, "teacher.model": str(teacher), "data.sources": (str(images),), "run.output": str(output)}
    settings |= {"student.kind": "lora", "student.rank": 4, "student.quantize_base": kind}
    settings |= {"optim.max_train_steps": steps, "run.checkpoint_every": steps, "optim.learning_rate": 1e-4}
    return losses(distill(resolve({}, settings)))


def test_a_lora_trains_on_an_int8_base_and_is_written_as_usual(
    small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    plain, rounded = (curve(small_teacher, image_folder, tmp_path / kind, kind, steps=2) for kind in ("none", "int8"))
    assert rounded == pytest.approx(plain, rel=0.02)
    assert rounded != plain
    one, other = (load_file(tmp_path / kind / "lora" / f"{kind}.safetensors") for kind in ("none", "int8"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_a_loss_curve_follows_that_of_the_plain_base(
    kind: str, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    """50 steps. The layers are 16 to 64 wide and random, so 4 bits change the teacher itself, and with it the loss."""
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    plain = curve(small_teacher, image_folder, tmp_path / "none", "none", steps=50)
    rounded = curve(small_teacher, image_folder, tmp_path / kind, kind, steps=50)
    assert rounded == pytest.approx(plain, rel={"int8": 0.02, "fp8": 0.1, "nf4": 0.4}[kind])
