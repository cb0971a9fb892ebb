"""Single files of Stable Diffusion 3: written, converted by diffusers to the same weights, and read back."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from lcmdistill.export.single_file import original_tensors
from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.teachers.single_file.inspect import Header, inspect_checkpoint, read_header
from lcmdistill.teachers.single_file.load import load_single_file
from lcmdistill.teachers.single_file.mmdit_keys import mmdit_config, original_mmdit
from lcmdistill.utils.errors import UsageError
from tests.support.models import build_sd3, models_of, opened
from tests.support.teachers import SMALL, Command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all text encoders."""
    pipeline, path = opened(folder), tmp_path_factory.mktemp("sd3-file") / "all.safetensors"
    tensors = original_tensors(pipeline, pipeline.transformer)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def equal(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_diffusers_converts_the_keys_to_the_same_weights(folder: Path, file: Path) -> None:
    transformer = opened(folder).transformer
    tensors = {key: value for key, value in load_file(file).items() if key.startswith("model.diffusion_model.")}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    expected = transformer.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_a_file_without_a_base_has_no_t5(folder: Path, file: Path, tmp_path: Path) -> None:
    without = build_sd3(tmp_path / "model", has_t5=False)
    pipeline, expected = load_single_file(file, configs=without), opened(folder)
    assert (pipeline.text_encoder_3, pipeline.tokenizer_3) == (None, None)
    for name, part in models_of(pipeline).items():
        assert equal(part, getattr(expected, name)), name
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.scheduler.config.shift == 3.0
    info = inspect_checkpoint(file, read_header(file))
    assert info.why == (
        "Stable Diffusion 3 (3 text encoders), flow matching; its T5 is used with --base only, which supplies the tokenizer"
    )
    with pytest.raises(UsageError, match="remove --prediction-type"):
        load_single_file(file, "epsilon", configs=without)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_base_supplies_what_a_file_lacks(prefix: str, folder: Path, file: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    bare = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    path = tmp_path / "m.safetensors"
    save_file({key.replace("model.diffusion_model.", prefix): 2 * value for key, value in bare.items()}, path)
    with pytest.raises(UsageError, match="holds no text_encoder and no text_encoder_2 and no vae; pass"):
        load_pipeline(str(path))
    pipeline, expected = load_pipeline(str(path), base=str(folder)), opened(folder)
    assert equal(pipeline.text_encoder_3, expected.text_encoder_3)
    weight = "transformer_blocks.2.norm1_context.linear.weight"
    torch.testing.assert_close(pipeline.transformer.state_dict()[weight], 2 * expected.transformer.state_dict()[weight])


def test_with_a_base_the_t5_of_a_file_is_read(folder: Path, file: Path) -> None:
    pipeline, expected = load_pipeline(str(file), base=str(folder)), opened(folder)
    for name, part in models_of(pipeline).items():
        assert equal(part, getattr(expected, name)), name


def test_the_t5_of_a_base_can_be_dropped(folder: Path, file: Path) -> None:
    pipeline = load_pipeline(str(file), base=str(folder), drop=("text_encoder_3",))
    assert (pipeline.text_encoder_3, pipeline.tokenizer_3) == (None, None)
    with pytest.raises(UsageError, match="has no text_encoder_2 that can be dropped; remove --drop text_encoder_2"):
        load_pipeline(str(file), base=str(folder), drop=("text_encoder_2",))


@pytest.mark.parametrize("name", ["joint_blocks.1.x_block.attn.qkv.weight", "pos_embed"])
def test_an_incomplete_file_is_refused(name: str, file: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    del tensors[f"model.diffusion_model.{name}"]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=name):
        load_pipeline(str(tmp_path / "m.safetensors"), base=str(folder))


SIZES: dict[str, dict[str, Any]] = {
    "3.5 medium": {"num_layers": 24, "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
    "3.5 large": {"num_layers": 38, "pos_embed_max_size": 192},
    "3 medium": {"num_layers": 24, "qk_norm": None, "pos_embed_max_size": 192},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_config_of_a_full_size_file_is_counted(name: str) -> None:
    library: Any = diffusers
    heads = SIZES[name]["num_layers"]
    options = {"qk_norm": "rms_norm", "num_attention_heads": heads, "caption_projection_dim": 64 * heads} | SIZES[name]
    with torch.device("meta"):
        network = library.SD3Transformer2DModel(**options)
    tensors = original_mmdit(network.state_dict(), heads)
    header = Header({}, {key: ("F16", tuple(value.shape)) for key, value in tensors.items()})
    counted = mmdit_config(header.tensors, "model.diffusion_model.")
    config = {key: network.config[key] for key in counted}
    assert counted == config | {"dual_attention_layers": list(config["dual_attention_layers"])}
    assert inspect_checkpoint(Path("m.safetensors"), header).missing == ("text_encoder", "text_encoder_2", "vae")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_is_exported_and_distilled_again(
    kind: str, folder: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 1}
    own = {key: value for key, value in own.items() if not key.startswith("objective.w")}
    sets = [f"--set={key}={value}" for key, value in own.items()]
    base = ["distill-lora" if kind == "lora" else "distill", "--teacher", folder, "--data", image_folder]
    code, _, error = command(*base, "--output", "run", *sets, *(["--set=student.rank=2"] if kind == "lora" else []))
    assert code == 0, error
    code, output, error = command(
        "export", "run", "--format", "single-file", "--output", "f.safetensors", "--dtype", "fp32"
    )
    assert code == 0, error
    assert "reloaded, largest difference" in output
    assert "scheduler simple" in output
    code, output, error = command("info", "f.safetensors")
    assert (code, "Stable Diffusion 3" in output) == (0, True), error
