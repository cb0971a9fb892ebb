"""Stable Diffusion 3: what its pipeline does is what is trained, with and without a T5, and files that others read."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcmdistill.sampling.student_pipeline import check_size
from lcmdistill.sampling.variations import start_image
from lcmdistill.students.lora_files import family_of_lora
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.training.preflight import validate_for_teacher
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import lora_file
from tests.support.models import build_sd3
from tests.support.runs import resolve
from tests.support.teachers import SMALL, Command

PROMPTS = ["a cat", "a dog in the rain"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether it has a T5 -> a small random model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {has_t5: build_sd3(tmp_path_factory.mktemp("sd3") / "model", has_t5=has_t5) for has_t5 in (True, False)}


@pytest.mark.parametrize("has_t5", [True, False])
def test_prompts_are_encoded_like_the_pipeline_encodes_them(has_t5: bool, folders: dict[bool, Path]) -> None:
    teacher = load_teacher(str(folders[has_t5]))
    embeds, _, pooled, _ = teacher.pipeline.encode_prompt(PROMPTS, None, None, "cpu", 1, False)
    cond = teacher.encode_prompts(PROMPTS)
    tokens = 77 + 256 * has_t5  # zeros are not kept
    assert cond["prompt_embeds"].shape == (2, tokens, 40)
    torch.testing.assert_close(cond["prompt_embeds"], embeds[:, :tokens])
    torch.testing.assert_close(cond["pooled"], pooled)
    z, t = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        found = teacher.call(teacher.network, z, t, cond.values, None)
        expected = teacher.network(z, embeds, pooled, t, return_dict=False)[0]
    torch.testing.assert_close(found, expected)


def test_the_t5_can_be_dropped(folders: dict[bool, Path], small_teacher: Path) -> None:
    """Its 4.7 billion weights need not be loaded."""
    dropped, without = load_teacher(str(folders[True]), drop=("text_encoder_3",)), load_teacher(str(folders[False]))
    assert (dropped.pipeline.text_encoder_3, dropped.pipeline.tokenizer_3) == (None, None)
    shapes = [
        {name: value.shape for name, value in teacher.encode_prompts(PROMPTS).values.items()}
        for teacher in (dropped, without)
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(UsageError, match="has no text_encoder_3 that can be dropped; remove --drop text_encoder_3"):
        load_teacher(str(small_teacher), drop=("text_encoder_3",))


def test_latents_are_shifted_and_scaled_like_in_the_pipeline(folders: dict[bool, Path]) -> None:
    teacher = load_teacher(str(folders[True]))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, _ = teacher.encode_images(pixels)
    with torch.no_grad():
        raw = teacher.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(mean, (raw - 0.0609) * 1.5305)
    torch.testing.assert_close(teacher.decode(mean), (teacher.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).detach())


@pytest.mark.parametrize(("has_t5", "limit"), [(True, 256), (False, 77)])
def test_a_prompt_is_as_long_as_the_longest_reader_reads(has_t5: bool, limit: int, folders: dict[bool, Path]) -> None:
    pipeline = load_teacher(str(folders[has_t5])).pipeline
    assert token_limit(pipeline) == limit
    assert count_truncated(pipeline, ["a cat", "a" * 100, "a" * 300]) == (1 if has_t5 else 2)


def test_sizes_beyond_the_table_of_positions_are_refused(folders: dict[bool, Path]) -> None:
    teacher = load_teacher(str(folders[False]))
    with pytest.raises(UsageError, match="--width is 104; this model generates at most 96 px"):
        check_size(teacher.pipeline, (32, 104))
    check_size(teacher.pipeline, (32, 96))
    settings: dict[str, Any] = {
        "teacher.model": "m",
        "objective.w_min": 3.5,
        "objective.w_max": 3.5,
        "data.resolution": 32,
    }
    settings |= {"data.sources": ("images",)}
    for name, more in {
        "data.resolution": {"data.resolution": 104},
        "data.buckets 32x104": {"data.buckets": ("32x104",)},
    }.items():
        config = resolve({}, {**settings, **more})
        with pytest.raises(UsageError, match=f"{name} has a side of 104 px, and .* covers 96 px"):
            validate_for_teacher(config, teacher)


def test_an_image_to_start_from_has_the_size_of_the_run_and_whole_patches(folders: dict[bool, Path]) -> None:
    pipeline = load_teacher(str(folders[False])).pipeline
    pipeline.transformer.register_to_config(patch_size=4)
    start = start_image(pipeline, Image.new("RGB", (64, 32)), 0.5, 2, None, 32)
    assert start.image.size == (48, 16)  # near 45 x 23, in multiples of 16 px
    _, kwargs = start.replace({"height": 32, "width": 32}, 1)
    assert (kwargs["height"], kwargs["width"]) == (16, 48)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_pcm_run_without_a_t5(
    kind: str, folders: dict[bool, Path], image_folder: Path, tmp_path: Path, command: Command
) -> None:
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 2}
    own = {key: value for key, value in own.items() if not key.startswith("objective.w")} | {"objective.phases": "2"}
    sets = [f"--set={key}={value}" for key, value in own.items()]
    base = ["distill-lora" if kind == "lora" else "distill", "--teacher", folders[False], "--data", image_folder]
    base += ["--objective", "pcm", "--output", "run", *(["--set=student.rank=2"] if kind == "lora" else [])]
    code, _, error = command(*base, *sets)
    assert code == 0, error
    code, _, error = command("sample", "run", "--steps", 2, "--prompt", "a cat", "--output", "s")
    assert code == 0, error
    if kind == "full":
        code, _, error = command("export", "run", "--format", "pipeline", "--output", "p")
        assert code == 0, error
        values: dict[str, Any] = {}
        exec(Path("run/README.md").read_text().partition("```python\n")[2].partition("```")[0], values)
        pipeline = values["pipeline"]
        assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        assert (pipeline.scheduler.config.shift, pipeline.text_encoder_3) == (3.0, None)
    else:
        code, _, error = command("export", "run", "--format", "fused", "--output", "f")
        assert code == 0, error
        assert 'from_pretrained("model", text_encoder_3=None, tokenizer_3=None)' in Path("run/README.md").read_text()
        assert 'from_pretrained("f", text_encoder_3=None, tokenizer_3=None)' in Path("f/README.md").read_text()


def test_a_lora_file_is_read_by_diffusers_and_has_the_keys_of_comfyui(
    folders: dict[bool, Path], image_folder: Path, tmp_path: Path, command: Command
) -> None:
    """Alpha is in the weights: ComfyUI reads these keys without the metadata that holds it."""
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 1, "student.rank": 2}
    own = {key: value for key, value in own.items() if not key.startswith("objective.w")} | {"student.alpha": 5.0}
    sets = [f"--set={key}={value}" for key, value in own.items()]
    code, _, error = command(
        "distill-lora", "--teacher", folders[False], "--data", image_folder, "--output", "run", *sets
    )
    assert code == 0, error
    file = lora_file(tmp_path / "run")
    assert (file.name, family_of_lora(file.parent).key) == ("run.safetensors", "sd3")
    tensors = load_file(file)
    layers = {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in tensors}
    assert all(key.startswith("transformer.transformer_blocks.") for key in tensors)
    assert {"transformer_blocks.0.attn2.to_q", "transformer_blocks.1.attn.add_k_proj"} <= layers
    assert {"transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.2"} <= layers
    pipeline = load_teacher(str(folders[False])).pipeline
    inputs = torch.randn(1, 16, 8, 8), torch.randn(1, 333, 40), torch.randn(1, 36), torch.tensor([500.0])
    weight = {name: module.weight.clone() for name, module in pipeline.transformer.named_modules() if name in layers}
    with torch.no_grad():
        before = pipeline.transformer(*inputs, return_dict=False)[0]
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        after = pipeline.transformer(*inputs, return_dict=False)[0]
        pipeline.unload_lora_weights()
        for name, module in pipeline.transformer.named_modules():
            if name in layers:  # by ComfyUI's rule for keys without alpha: up @ down
                up, down = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "BA")
                module.weight.copy_(weight[name] + up @ down)
        merged = pipeline.transformer(*inputs, return_dict=False)[0]
    torch.testing.assert_close(after, merged, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            2.243,  # and .226 in its table of positions: 2.5, as published
        ),
        (
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            8.057,
        ),
        (
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
            2.028,
        ),
    ],
    ids=["3.5 medium", "3.5 large", "3 medium"],
)
def test_full_size_transformers_have_the_published_numbers_of_parameters(
    config: dict[str, Any], billions: float
) -> None:
    library: Any = diffusers
    with torch.device("meta"):
        network = library.SD3Transformer2DModel(**config)
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
