"""What a run exports: a complete pipeline that diffusers loads by itself and that draws in few steps."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from lcmdistill.diffusion.consistency import OMEGA_DIM
from lcmdistill.diffusion.schedules import ddim_grid
from lcmdistill.export.diffusers_pipeline import add_vocabularies, save_pipeline
from lcmdistill.objectives.common import skipping_grid_options
from lcmdistill.sampling.generate import check_steps
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.schedulers import vp_scheduler
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL, build_teacher, write_tokenizer


def loaded(name: str, folder: Path) -> Any:
    import diffusers

    library: Any = diffusers
    pipeline = getattr(library, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_bare_call_generates_at_the_trained_resolution(
    small_teacher: Path, tmp_path: Path, image_folder: Path
) -> None:
    own = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),), "data.resolution": 24}
    own |= {"run.output": str(tmp_path / "run"), "optim.max_train_steps": 1}
    folder = distill(resolve({}, {**SMALL, **own}))
    assert loaded("DiffusionPipeline", small_teacher)("red heart", num_inference_steps=1).images[0].size == (16, 16)
    for_run = loaded("DiffusionPipeline", folder / "pipeline")
    assert for_run("red heart", num_inference_steps=1).images[0].size == (24, 24)


@pytest.mark.parametrize("name", ["DiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_diffusers_loads_it_and_generates_in_few_steps(small_run: Path, name: str) -> None:
    pipeline = loaded(name, small_run / "pipeline")
    kind = "StableDiffusionPipeline" if name == "StableDiffusionPipeline" else "LatentConsistencyModelPipeline"
    assert type(pipeline).__name__ == kind
    pictures = []
    for steps in (1, 2, 4, 8):
        image = pipeline(
            "red heart",
            num_inference_steps=steps,
            guidance_scale=4.0,
            height=16,
            width=16,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        assert image.size == (16, 16)
        pictures.append(np.asarray(image, dtype=float))
    assert all(picture.std() > 1 for picture in pictures)  # no blank
    assert all(np.abs(a - b).max() > 0 for a, b in pairwise(pictures))


def test_its_network_is_the_target_of_the_last_checkpoint_bit_for_bit(small_run: Path) -> None:
    target = load_file(checkpoints(small_run / "checkpoints")[-1] / "target.safetensors")
    student = load_file(checkpoints(small_run / "checkpoints")[-1] / "student.safetensors")
    exported = load_file(small_run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == target.keys()
    assert all(torch.equal(exported[name], target[name]) for name in target)
    assert not all(torch.equal(exported[name], student[name]) for name in target)


def test_its_network_takes_omega_and_guidance_acts(small_run: Path) -> None:
    assert json.loads((small_run / "pipeline/unet/config.json").read_text())["time_cond_proj_dim"] == OMEGA_DIM
    pipeline = loaded("DiffusionPipeline", small_run / "pipeline")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    weak, strong = (
        pipeline("red heart", latents=noise, num_inference_steps=1, guidance_scale=g, output_type="latent").images
        for g in (2.0, 6.0)
    )
    assert (weak - strong).abs().max() > 0


def test_everything_else_is_the_teacher_s(small_run: Path, small_teacher: Path) -> None:
    folder = small_run / "pipeline"
    vae = "vae/diffusion_pytorch_model.safetensors"
    mine, its = load_file(folder / vae), load_file(small_teacher / vae)
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    mine, its = (loaded("DiffusionPipeline", where).text_encoder.state_dict() for where in (folder, small_teacher))
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_the_text_encoder_s_keys_are_those_of_transformers_4(small_run: Path) -> None:
    keys = load_file(small_run / "pipeline" / "text_encoder" / "model.safetensors").keys()
    assert keys
    assert all(key.startswith("text_model.") and not key.startswith("text_model.text_model.") for key in keys)


def test_a_tokenizer_has_the_files_of_transformers_4(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "source")
    vocabulary = json.loads((tmp_path / "source" / "vocab.json").read_text())
    vocabulary |= {"ca": len(vocabulary), "cat</w>": len(vocabulary) + 1}
    merges = ["c a", "ca t</w>"]
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "source" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    saved = tmp_path / "made" / "tokenizer"
    CLIPTokenizer.from_pretrained(tmp_path / "source").save_pretrained(saved)
    add_vocabularies(tmp_path / "made")
    assert json.loads((saved / "vocab.json").read_text()) == vocabulary
    assert (saved / "merges.txt").read_text().split("\n") == ["#version: 0.2", *merges, ""]


def test_the_weights_are_safetensors_only(small_run: Path) -> None:
    suffixes = {path.suffix for path in (small_run / "pipeline").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".md", ".txt"}


def test_its_card_says_how_it_is_used(small_run: Path) -> None:
    card = (small_run / "pipeline" / "README.md").read_text()
    assert card.startswith("---\n")
    for part in (
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "DiffusionPipeline.from_pretrained",
        "omega",
    ):
        assert part in card


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_its_scheduler_has_the_teacher_s_betas_and_prediction_type(tmp_path: Path, prediction_type: str) -> None:
    teacher = load_teacher(str(build_teacher(tmp_path / "teacher", prediction_type)))
    save_pipeline(student_pipeline(teacher, teacher.network), tmp_path / "pipeline", "card")
    scheduler = loaded("DiffusionPipeline", tmp_path / "pipeline").scheduler
    assert type(scheduler).__name__ == "LCMScheduler"
    assert scheduler.config.prediction_type == prediction_type
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.00085, 0.012)
    alphas = teacher.schedule.alpha(torch.arange(1000)).flatten()
    torch.testing.assert_close(scheduler.alphas_cumprod, alphas**2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.001 * (i + 1) for i in range(1000)]},
    ],
)
def test_a_scheduler_is_built_on_any_betas(changes: dict[str, Any]) -> None:
    from diffusers import DDIMScheduler

    teacher: Any = DDIMScheduler(
        **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **changes}
    )
    scheduler = vp_scheduler(teacher.config, "LCMScheduler", {})
    torch.testing.assert_close(scheduler.alphas_cumprod, teacher.alphas_cumprod)
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == 4


def test_the_time_steps_are_those_that_were_trained(small_run: Path) -> None:
    """On the grid i k - 1, k = 20: one step starts at 999, as the student saw it."""
    scheduler = loaded("DiffusionPipeline", small_run / "pipeline").scheduler
    for steps, expected in [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])]:
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("times", ["grid", "all"])
@pytest.mark.parametrize("skip", [5, 10, 20, 25, 50, 100, 250, 500])
def test_sampled_time_steps_are_trained_for_every_skip(skip: int, times: str, name: str) -> None:
    from diffusers import DDIMScheduler

    options = skipping_grid_options(SimpleNamespace(skip=skip, times=times), 1000)
    count = options.get("original_inference_steps", 50)
    trained = set(ddim_grid(1000, skip).tolist()) if times == "grid" else set(range(skip, 1000))
    scheduler = vp_scheduler(DDIMScheduler().config, name, options)
    if times == "grid":
        assert count == 1000 // skip
    if skip == 20:
        assert options == {}
        assert scheduler.config.original_inference_steps == 50
    for steps in range(1, 9):
        if steps > count:
            with pytest.raises(ValueError, match=r"cannot be larger|smaller than `num_inference_steps`"):
                scheduler.set_timesteps(steps)
            with pytest.raises(UsageError, match=f"--steps is {steps}; this model's scheduler has {count}"):
                check_steps(SimpleNamespace(scheduler=scheduler), steps)
            continue
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= trained
        assert scheduler.timesteps[0] == 999
        assert len(scheduler.timesteps) == steps


def test_methods_without_a_skip_keep_the_default_time_steps() -> None:
    assert skipping_grid_options(SimpleNamespace(scales=18), 1000) == {}
    assert skipping_grid_options(SimpleNamespace(skip=7, times="all"), 1000) == {}
    assert skipping_grid_options(SimpleNamespace(scales=18), 40) == {"original_inference_steps": 40}


def test_a_pipeline_is_whole_or_the_old_one(tmp_path: Path, small_teacher: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    save_pipeline(student_pipeline(teacher, teacher.network), tmp_path / "pipeline", "old")

    class Unlucky:
        def save_pretrained(self, folder: Path, **options: Any) -> None:
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_pipeline(Unlucky(), tmp_path / "pipeline", "new")
    assert (tmp_path / "pipeline" / "README.md").read_text() == "old"
    assert not (tmp_path / "pipeline" / "half").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline"}
