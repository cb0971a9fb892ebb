"""Single-file teachers: identified by their keys, read with the configs that ship here; and full sizes as published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcmdistill.export.single_file import write_single_file
from lcmdistill.teachers.loading import checkpoint_summary, load_teacher
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.teachers.single_file import load as single_file
from lcmdistill.teachers.single_file.inspect import Header, inspect_checkpoint
from lcmdistill.teachers.single_file.load import CONFIGS, load_single_file, write_vocabulary
from lcmdistill.teachers.single_file.sd_keys import TEXT_STYLES, original_unet, original_vae
from lcmdistill.utils.errors import UsageError
from tests.support.models import (
    BUILDERS,
    TRANSFORMERS_5,
    AutoencoderKL,
    PixArt,
    UNet,
    build_inpainting,
    models_of,
    opened,
)
from tests.support.overrides import same_part
from tests.support.teachers import Command

LAYOUTS = {layout.key: layout for key in ("sd", "sdxl") for layout in FAMILIES[key].layouts}

each_layout = pytest.mark.parametrize("layout", list(LAYOUTS))

SIZES = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
"parameters of the U-Nets, as published"


def config_of(layout: str, part: str) -> dict[str, Any]:
    return json.loads((CONFIGS / layout / part / "config.json").read_text())


@pytest.fixture(scope="session")
def full_size() -> dict[str, dict[str, Any]]:
    """layout -> part -> the full-size model of the shipped configs, on the meta device."""
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    models: dict[str, dict[str, Any]] = {}
    with torch.device("meta"):
        for layout in LAYOUTS:
            models[layout] = {"unet": UNet.from_config(config_of(layout, "unet"))}
            models[layout]["vae"] = AutoencoderKL.from_config(config_of(layout, "vae"))
            for part, kind in classes.items():
                if (CONFIGS / layout / part).is_dir():
                    models[layout][part] = kind(CLIPTextConfig(**config_of(layout, part)))
    return models


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@each_layout
def test_the_shipped_configs_have_the_published_sizes(layout: str, full_size: dict[str, dict[str, Any]]) -> None:
    models = full_size[layout]
    assert count(models["unet"]) == SIZES[layout]
    assert count(models["vae"]) == 83_653_863
    text = {"sd1": [123_060_480], "sd2": [340_387_840], "sdxl": [123_060_480, 694_659_840]}
    assert [count(models[part]) for part in ("text_encoder", "text_encoder_2") if part in models] == text[layout]


def test_pixart_has_its_published_size() -> None:
    """PixArt-XL-2 is described as 0.6B, its checkpoints as 611M; the 512 px one has no embedding of sizes."""
    with torch.device("meta"):
        large = PixArt(sample_size=128, cross_attention_dim=1152, caption_channels=4096)
        small = PixArt(sample_size=64, cross_attention_dim=1152, caption_channels=4096)
    assert (count(large), count(small)) == (611_349_152, 610_856_096)


def original_keys(layout: str, models: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a full-size checkpoint, on the meta device."""
    tensors = original_unet(models["unet"].state_dict(), models["unet"].config)
    tensors |= original_vae(models["vae"].state_dict(), models["vae"].config)
    for name, (prefix, style) in LAYOUTS[layout].text_encoders.items():
        tensors |= TEXT_STYLES[style](models[name].state_dict(), models[name].config, prefix)
    return tensors


def header_of(tensors: Mapping[str, Tensor], **metadata: str) -> Header:
    return Header(metadata, {name: ("F16", tuple(value.shape)) for name, value in tensors.items()})


@each_layout
def test_real_checkpoints_are_recognised_by_their_keys(layout: str, full_size: dict[str, dict[str, Any]]) -> None:
    tensors = original_keys(layout, full_size[layout])
    found = inspect_checkpoint(Path("x.safetensors"), header_of(tensors))
    guess = "v_prediction" if layout == "sd2" else "epsilon"
    assert (found.layout.key, found.family.takes_mask, found.prediction_type, found.zero_snr) == (
        layout,
        False,
        guess,
        False,
    )
    width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[layout]
    assert f"cross-attention {width} wide, 4 channels" in found.why
    assert ("assumed" in found.why) == (layout == "sd2")


MARKS: list[tuple[str, dict[str, str], str, str]] = [
    ("sd1 v_pred", {}, "v_prediction", "v_pred marker"),
    ("sdxl v_pred ztsnr", {}, "v_prediction", "zero-terminal SNR"),
    ("sd2", {"modelspec.prediction_type": "epsilon"}, "epsilon", "its header says so"),
    ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", "v2-512"),
    ("sd2 9", {}, "epsilon", "9 channels"),
    ("sd1 9", {}, "epsilon", "inpainting"),
    ("sd1", {"modelspec.prediction_type": "v"}, "v_prediction", "its header says so"),
]


@pytest.mark.parametrize(("marks", "metadata", "prediction_type", "why"), MARKS)
def test_the_metadata_of_a_file_is_used(
    marks: str, metadata: dict[str, str], prediction_type: str, why: str, full_size: dict[str, dict[str, Any]]
) -> None:
    layout, *more = marks.split()
    tensors = original_keys(layout, full_size[layout])
    tensors |= {name: torch.empty(0) for name in more if name != "9"}
    if "9" in more:
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(320, 9, 3, 3, device="meta")
    found = inspect_checkpoint(Path("x.safetensors"), header_of(tensors, **metadata))
    assert (found.layout.key, found.prediction_type) == (layout, prediction_type)
    assert (found.family.takes_mask, found.zero_snr) == ("9" in more, "ztsnr" in more)
    assert why in found.why


U, C = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"

REFUSED: list[tuple[dict[str, tuple[int, ...]], str]] = [
    ({"lora_unet_x.lora_down.weight": (4, 8)}, "is a LoRA; specify the checkpoint"),
    ({"double_blocks.0.img_attn.qkv.weight": (4, 8)}, "is a FLUX transformer; cannot be used as a file"),
    (
        {"model_ema.diffusion_modelout2weight": (4,), C: (1,)},
        "is a checkpoint with the EMA copy of its network only; cannot",
    ),
    ({"control_model.input_blocks.0.0.weight": (4, 8)}, "is a ControlNet; cannot be used here"),
    ({"decoder.conv_in.weight": (4, 8)}, "is a VAE; pass it as --vae to distill"),
    ({"something.weight": (4, 8)}, "holds no Stable Diffusion U-Net"),
    ({U: (8, 4, 3, 3)}, "holds no text_encoder and no vae; pass --text-encoder and --vae"),
    ({U: (8, 4, 3, 3), "conditioner.embedders.0.model.x": (1,)}, "is SDXL's refiner"),
    ({U: (8, 4, 3, 3), C: (1,)}, "holds no vae; pass --vae, or --base MODEL"),
    ({U: (8, 8, 3, 3), C: (1,), "first_stage_model.x": (1,)}, "takes 8 channels"),
    ({U: (8, 4, 3, 3), C: (1,), "first_stage_model.x": (1,), "edm_mean": (1,)}, "EDM's noise levels"),
]


@pytest.mark.parametrize(("shapes", "message"), REFUSED)
def test_what_is_no_checkpoint_is_refused_by_what_it_is(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=message) as caught:
        load_teacher(str(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"rubbish that is longer than eight bytes",
        *map(
            with_header,
            (
                b"[1,2]",
                b"[" * 50_000,
                b'{"__metadata__": ["a"]}',
                b'{"__metadata__": {"a": 1}}',
                b'{"a": 7}',
                b'{"a": {"dtype": 7, "shape": [], "data_offsets": [0, 0]}}',
                b'{"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 0]}}',
                b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}',
                b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [-4, 0]}}',
                b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}',
            ),
        ),
    ],
    ids=lambda content: repr(content[8:70]),
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="is not a safetensors file"):
        load_teacher(str(tmp_path / "a.safetensors"))


def test_the_missing_part_of_a_file_is_reported(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "a.safetensors"
    save_file({U: torch.zeros(8, 4, 3, 3), C: torch.zeros(1), "first_stage_model.x": torch.zeros(1)}, path)
    assert command("info", path)[0] == 0
    path.write_bytes(path.read_bytes()[:-500])
    code, _, error = command("info", path)
    assert (code, "500 bytes are missing at its end" in error) == (2, True)


def test_the_vocabulary_is_clip_s(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert len(vocabulary) == 49_408
    assert (vocabulary["!"], vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (0, 49_406, 49_407)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=77)
    # OpenAI's own tokenizer gives these.
    for text, ids in {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "Hello, World!": [3306, 267, 1002, 256],
        "naïve": [1097, 35689, 563],
        "日本 émoji 😀 it's 12": [39121, 19277, 361, 3459, 617, 2697, 7334, 585, 568, 272, 273],
    }.items():
        if TRANSFORMERS_5 or "日" not in text:  # 4 parts Chinese words, without ftfy
            assert tokenizer(text).input_ids[1:-1] == ids


def test_what_it_was_taken_for_is_said_before_anything_is_loaded(
    tmp_path: Path, small_teacher: Path, command: Command
) -> None:
    write_single_file(opened(small_teacher), tmp_path / "my.safetensors", dtype=torch.float32)
    words = ["distill", "--teacher", "my.safetensors", "--prediction-type", "v_prediction", "--dry-run"]
    _, output, error = command(*words)
    first = output.splitlines()[0]
    assert first.startswith(
        "my.safetensors is Stable Diffusion 1 (CLIP's text encoder, cross-attention 16 wide, 4 channels)"
    )
    assert first.endswith("used as v_prediction, set by --prediction-type")
    assert "lacks model.diffusion_model." in error  # it is no file of the full size
    assert error.count("\n") == 1


@pytest.mark.parametrize("layout", [*BUILDERS, "inpainting"])
def test_our_own_single_file_is_the_same_teacher(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_inpainting if layout == "inpainting" else BUILDERS[layout]
    folder, file = build(tmp_path / "model"), tmp_path / "model.safetensors"
    pipeline = opened(folder)
    write_single_file(pipeline, file, dtype=torch.float32)
    # Small models have configs of their own; everything else is as it is for a file of the full size.
    small = tmp_path / "configs" / ("sd1" if layout == "inpainting" else layout)
    folder.rename(tmp_path / "moved")
    small.parent.mkdir()
    (tmp_path / "moved").rename(small)
    monkeypatch.setattr(single_file, "CONFIGS", small.parent)
    teacher = load_teacher(str(file))
    assert type(teacher.pipeline) is type(pipeline)
    assert teacher.prediction_type == pipeline.scheduler.config.prediction_type
    assert float(teacher.schedule.alpha(torch.tensor([999]))) == pytest.approx(
        float(pipeline.scheduler.alphas_cumprod[-1]) ** 0.5, abs=1e-3
    )
    for name, model in models_of(pipeline).items():
        assert same_part(models_of(teacher.pipeline)[name], model)
    assert "is Stable Diffusion" in checkpoint_summary(str(file), None)
    other = load_teacher(str(file), prediction_type="sample")
    assert (other.prediction_type, other.pipeline.scheduler.config.prediction_type) == ("sample", "sample")


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path, small_teacher: Path) -> None:
    write_single_file(opened(small_teacher), tmp_path / "a.safetensors", dtype=torch.float32)
    tensors = load_file(tmp_path / "a.safetensors")
    lost = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    save_file({name: value for name, value in tensors.items() if name != lost}, tmp_path / "b.safetensors")
    with pytest.raises(
        UsageError,
        match=r"b.safetensors lacks .*final_layer_norm.weight, in total 1 of the \d+ weights of its text_encoder",
    ):
        load_single_file(tmp_path / "b.safetensors", configs=small_teacher)
    lost = "model.diffusion_model.middle_block.1.norm.weight"
    save_file({name: value for name, value in tensors.items() if name != lost}, tmp_path / "c.safetensors")
    with pytest.raises(
        UsageError, match=r"c.safetensors lacks model.diffusion_model.middle_block.1.norm.weight, in total 1 of"
    ):
        load_single_file(tmp_path / "c.safetensors", configs=small_teacher)


def test_a_text_encoder_named_as_in_2022_is_read(tmp_path: Path, small_teacher: Path) -> None:
    pipeline = opened(small_teacher)
    write_single_file(pipeline, tmp_path / "a.safetensors", dtype=torch.float16)
    tensors = {name.replace("text_model.", ""): value for name, value in load_file(tmp_path / "a.safetensors").items()}
    positions = "cond_stage_model.transformer.embeddings.position_ids"
    tensors[positions] = tensors[positions].half() - 1  # as merging left them in many a file
    save_file(tensors, tmp_path / "old.safetensors")
    encoder = load_single_file(tmp_path / "old.safetensors", configs=small_teacher).text_encoder
    within = getattr(encoder, "text_model", encoder)  # with the version of transformers
    assert within.embeddings.position_ids.tolist() == [list(range(77))]
    state = encoder.state_dict()
    assert all(
        torch.equal(state[name], each.half().float()) for name, each in pipeline.text_encoder.state_dict().items()
    )
    lost = "cond_stage_model.transformer.final_layer_norm.weight"
    save_file({name: value for name, value in tensors.items() if name != lost}, tmp_path / "b.safetensors")
    with pytest.raises(
        UsageError,
        match=r"b.safetensors lacks .*final_layer_norm.weight, in total 1 of the \d+ weights of its text_encoder",
    ):
        load_single_file(tmp_path / "b.safetensors", configs=small_teacher)
