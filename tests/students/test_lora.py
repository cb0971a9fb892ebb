"""The LoRA student: the teacher bit for bit with the adapter off, the published sizes, and files that keep the update."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lcmdistill.cli import app
from lcmdistill.config.schema import StudentConfig
from lcmdistill.students.lora import ONLINE, add_lora
from lcmdistill.teachers.sd import call_unet
from lcmdistill.utils.errors import UsageError
from tests.support.lora import disturb, example, lora_student
from tests.support.teachers import Command

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "base", "adapter"),
    [(SD15, 859_520_964, 67_252_224), (SDXL, 2_567_463_684, 196_751_360)],
    ids=["sd15", "sdxl"],
)
def test_the_published_parameter_counts(config: dict[str, Any], base: int, adapter: int):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        assert sum(p.numel() for p in unet.parameters()) == base
        add_lora(unet, ONLINE, StudentConfig(), seed=0)
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == adapter


def test_adapter_off_is_the_teacher_bit_for_bit(small_teacher: Path):
    bare, student = lora_student(small_teacher)
    disturb(student.trainable)
    assert not torch.allclose(student.online(*example()), bare, atol=1e-2)
    assert torch.equal(student.teacher(*example()), bare)
    assert torch.equal(student.teacher(*example()), bare), "asking twice must not change the answer"


def test_it_starts_at_the_teacher_and_only_the_adapter_learns(small_teacher: Path):
    bare, student = lora_student(small_teacher)
    output = student.online(*example())
    assert torch.equal(output, bare)
    output.square().mean().backward()
    learning = {id(p) for p in student.trainable.values()}
    assert {id(p) for p in student.network.parameters() if p.grad is not None} == learning
    assert {id(p) for p in student.network.parameters() if p.requires_grad} == learning


def test_the_ema_target_is_an_adapter_of_its_own(small_teacher: Path):
    _, student = lora_student(small_teacher, target="ema")
    assert all(torch.equal(student.trainable[k], student.averaged[k]) for k in student.trainable)
    disturb(student.trainable)
    online, target = student.online(*example()), student.target(*example())
    assert not torch.allclose(online, target, atol=1e-2)
    disturb(student.averaged)
    assert torch.equal(student.target(*example()), student.online(*example()))


def test_the_live_target_is_the_student(small_teacher: Path):
    _, student = lora_student(small_teacher, target="live")
    disturb(student.trainable)
    assert torch.equal(student.online(*example()), student.target(*example()))
    assert not student.averaged


@pytest.mark.parametrize("target", ["live", "ema"])
def test_dropout_acts_in_what_is_trained_and_nowhere_else(small_teacher: Path, target: str):
    _, plain = lora_student(small_teacher, target=target)
    bare, student = lora_student(small_teacher, target=target, dropout=0.5)
    for each in (plain, student):
        disturb(each.trainable)
        disturb(each.averaged, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(student.online(*example()), plain.online(*example()), atol=1e-3)
        assert torch.equal(student.target(*example()), plain.target(*example()))
        assert torch.equal(student.teacher(*example()), bare)
        student.online(*example())
        drawn = call_unet(student.for_sampling(), *example())
        assert torch.equal(drawn, plain.target(*example()))


def test_the_first_weights_come_from_the_seed_alone(small_teacher: Path):
    first, second = (lora_student(small_teacher)[1].trainable for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(value.abs().sum() > 0 for value in first.values())


def test_a_rank_above_a_layers_width_is_refused(small_teacher: Path):
    with pytest.raises(UsageError, match=r"rank is 64, which exceeds the width of .*lower --rank"):
        lora_student(small_teacher, rank=64)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("nonsense",), "no layer of the teacher is named 'nonsense'"),
        (("to_q", "nonsense"), "no layer of the teacher is named 'nonsense'"),
        (
            ("to_q,to_k",),
            "no layer of the teacher is named 'to_q,to_k'; specify layers such as to_q, one per --target-modules",
        ),
        (("attn1",), r"down_blocks\S+attn1 \(Attention\) is neither a linear layer nor a convolution"),
        (("to_q", "norm1"), r"norm1 \(\w+Norm\) is neither a linear layer nor a convolution"),
    ],
)
def test_names_of_what_no_lora_can_be_on_are_refused(small_teacher: Path, names: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=message):
        lora_student(small_teacher, target_modules=names)


def test_a_layer_at_the_top_gets_its_lora_too(small_teacher: Path):
    _, student = lora_student(small_teacher, target_modules=("conv_in",))
    assert {"conv_in.lora_A", "conv_in.lora_B"} <= student.trainable.keys()


@pytest.mark.parametrize("words", [["--rank", 64], ["--rank", 4, "--target-modules", "attn1"]])
def test_impossible_layers_are_refused_before_data_are_prepared(
    words: list[Any], small_teacher: Path, image_folder: Path, tmp_path: Path, command: Command
):
    output = tmp_path / "run"
    options = [
        "distill-lora",
        "--teacher",
        small_teacher,
        "--data",
        image_folder,
        "--resolution",
        16,
        "--output",
        output,
    ]
    code, _, error = command(*options, *words)
    assert (code, error.count("\n")) == (2, 1), error
    assert not output.exists()


def test_a_lora_with_dropout_resumes_bit_for_bit(small_teacher: Path, image_folder: Path, tmp_path: Path):
    words = ["distill-lora", "--teacher", str(small_teacher), "--data", str(image_folder), "--resolution", "16"]
    words += [
        "--rank",
        "4",
        "--alpha",
        "4",
        "--dropout",
        "0.5",
        "--batch-size",
        "2",
        "--gradient-accumulation-steps",
        "2",
    ]
    words += ["--set", "run.validate_every=0", "--target", "ema", "--learning-rate", "0.01"]
    for output, parts in (("whole", ("4",)), ("halves", ("2", "4"))):
        for steps in parts:
            run = [
                *words,
                "--output",
                str(tmp_path / output),
                "--max-train-steps",
                steps,
                "--set",
                "data.max_samples=12",
            ]
            assert CliRunner().invoke(app, run, catch_exceptions=False).exit_code == 0
    for name in ("student", "target", "optimizer"):
        files = [tmp_path / output / f"checkpoints/step-00000004/{name}.safetensors" for output in ("whole", "halves")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
