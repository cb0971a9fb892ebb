"""Shared fixtures: a small random Stable Diffusion, built from its real classes, and small real image folders."""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Looking for garbage among a million objects of the libraries is a twentieth of the tests' time.
gc.set_threshold(100_000, 50, 50)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Golden values and bitwise equality are a CPU's, whatever else a machine has.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Models this small are fastest on one thread, and processes that are compared bit for bit must not differ in it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


# Runs `lcmdistill ARGUMENTS`: its exit code, what it said, and what it said of errors.
Command = Callable[..., tuple[int, str, str]]

# A run small enough to be repeated dozens of times.
SMALL: dict[str, Any] = {
    "data.resolution": 16,
    "optim.batch_size": 4,
    "optim.accumulate": 1,
    "optim.learning_rate": 1e-3,
    "optim.max_train_steps": 4,
    "objective.w_min": 1.0,
    "objective.w_max": 5.0,
    "run.log_every": 1,
    "run.checkpoint_every": 2,
    "run.validate_every": 0,
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level CLIP tokenizer without merges: every letter is a token."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def fill(module: Any, seed: int) -> None:
    """Random weights that depend on the seed and their names alone, so that golden values outlive a library's release."""
    import torch

    from lcmdistill.diffusion.random import derive_seed

    for name, parameter in module.named_parameters():
        draws = torch.randn(
            parameter.shape,
            generator=torch.Generator().manual_seed(derive_seed(seed, name.removeprefix("text_model."))),
        )
        is_gain = parameter.dim() == 1 and name.endswith("weight")
        scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data.copy_(is_gain + scale * draws)


def build_teacher(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A random SD-shaped pipeline of about 0.1M parameters at 16 px, saved as a diffusers folder."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    library: Any = diffusers  # whose annotations are narrower than what it takes
    unet = library.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = library.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.5,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    )
    for part in (unet, vae, text):
        fill(part, seed)
    write_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / f"{folder.name}-tokenizer", model_max_length=77)
    scheduler = library.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    pipeline = library.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random epsilon teacher."""
    return build_teacher(tmp_path_factory.mktemp("teacher") / "small")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve real emoji of the bundled shards as PNGs with captions beside them."""
    from itertools import islice

    from lcmdistill.data.sources.registry import open_source

    folder = tmp_path_factory.mktemp("images")
    for i, member in enumerate(islice(open_source("tiny", None), 12)):
        assert isinstance(member.image, bytes)
        (folder / f"{i:02d}.webp").write_bytes(member.image)
        (folder / f"{i:02d}.txt").write_text(member.caption or "")
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path) -> Path:
    """The folder of a finished run on the small teacher, with validation grids."""
    from lcmdistill.config.resolve import resolve
    from lcmdistill.training.trainer import distill

    folder = tmp_path_factory.mktemp("runs") / "runs" / "small-lcm"
    own = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),), "run.output": str(folder)}
    own |= {"data.cache_dir": str(folder.parent.parent / "cache"), "run.validate_every": 4}
    return distill(resolve({}, {**SMALL, **own, "run.validation_prompts": ("red heart",)}))


@pytest.fixture(scope="session")
def small_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random feature network as a TorchScript file: what --features takes."""

    import torch

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(8, 3, 5, 5, generator=generator))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(images.float() / 255, self.weight, stride=3).relu().mean((2, 3))

    path = tmp_path_factory.mktemp("features") / "small.pt"
    torch.jit.script(Features()).save(str(path))
    return path


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory, small_run: Path, small_features: Path) -> Path:
    """A copy of the small run with an evaluation of few images."""
    import shutil

    from lcmdistill.evaluation.evaluate import Wish, evaluate

    folder = tmp_path_factory.mktemp("evaluated") / "small-lcm"
    shutil.copytree(small_run, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LCMDISTILL_CACHE", str(folder.parent / "cache"))
        evaluate(
            [folder],
            Wish(steps=(1, 2), guidance_scales=(4.0, 2.0), num_images=3, features=small_features, device="cpu"),
        )
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCMDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run the command line in tmp_path: its exit code, what it said, and what it said of errors."""
    monkeypatch.chdir(tmp_path)

    from lcmdistill import cli

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcmdistill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run
