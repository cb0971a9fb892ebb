"""Every objective as a run: distilled, resumed, sampled, and what becomes of its guidance."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from safetensors import safe_open

from lcmdistill.diffusion.parameterization import to_x0_eps
from lcmdistill.diffusion.schedules import vp_schedule
from lcmdistill.export.registry import export
from lcmdistill.hub.model_card import put_export_card
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.report.uses import uses
from lcmdistill.sampling.generate import find_model, generate, load_student
from tests.support.methods import MethodRunner, index
from tests.support.runs import resolve
from tests.support.teachers import Command
from tests.support.training import assert_same, losses

# What a run of each leaves: its pipeline's class, its scheduler, and whether its U-Net has an omega input.
LEFT = {
    "lcm": ("LatentConsistencyModelPipeline", "LCMScheduler", True),
    "lcf": ("LatentConsistencyModelPipeline", "LCMScheduler", True),
    "tcd": ("StableDiffusionPipeline", "TCDScheduler", True),
    "pcm": ("StableDiffusionPipeline", "DDIMScheduler", False),
    "tdm": ("StableDiffusionPipeline", "DDIMScheduler", False),
    "cd": ("StableDiffusionPipeline", "LCMScheduler", False),
    "ct": ("StableDiffusionPipeline", "LCMScheduler", False),
    "ict": ("StableDiffusionPipeline", "LCMScheduler", False),
    "ect": ("StableDiffusionPipeline", "LCMScheduler", False),
}


# Recorded when the layers below were proven; a refactoring that moves them has changed what is computed.
GOLDEN = {
    "pcm": [0.04964058, 0.05172992, 0.05916056, 0.07412531],
    "tdm": [0.1453920, 0.08310902, 0.1492814, 0.05759802],
    "lcm": [0.1452281, 0.1921108, 0.1353092, 0.5790436],
    "lcf": [0.1671074, 0.186042, 0.1257128, 0.363804],
    "tcd": [0.0736863, 0.1075352, 0.1064253, 0.4328819],
    "cd": [0.02701187, 0.0309595, 0.02071378, 0.1421837],
    "ct": [280.5037, 0.09364581, 0.09463592, 0.01399156],
    "ict": [18.37138, 20.09307, 21.59157, 28.38447],
    "ect": [18.34966, 19.66086, 22.03105, 48.81092],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_has_the_golden_losses_resumes_bit_for_bit_and_generates(
    method_run: MethodRunner, objective: str
) -> None:
    options: dict[str, Any] = {"optim__learning_rate": 1e-4}
    options |= {"objective__curriculum_steps": 4} if objective in ("ct", "ict", "ect") else {}
    whole = method_run(objective, "whole", **options)
    assert losses(whole) == pytest.approx(GOLDEN[objective], rel=1e-3)
    method_run(objective, "parts", optim__max_train_steps=2, **options)
    assert_same(method_run(objective, "parts", **options), whole)
    pipeline, scheduler, has_omega_input = LEFT[objective]
    assert index(whole)["_class_name"] == pipeline
    assert index(whole)["scheduler"][1] == scheduler
    unet = json.loads((whole / "pipeline" / "unet" / "config.json").read_text())
    assert (unet["time_cond_proj_dim"] is not None) == has_omega_input
    found = find_model(str(whole))
    student = load_student(found.path, torch.device("cpu"))
    images = [
        generate(student, ["red heart"], [0], steps=steps, guidance_scale=found.guidance_scale or 0) for steps in (1, 2)
    ]
    assert images[0][0].image.size == (16, 16)
    assert images[0][0].image.tobytes() != images[1][0].image.tobytes()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_is_validated_and_its_card_says_what_it_is_and_how_it_is_used(
    method_run: MethodRunner, objective: str
) -> None:
    folder = method_run(
        objective, optim__max_train_steps=1, run__validate_every=1, run__validation_prompts=("red heart",)
    )
    assert len(list((folder / "samples").glob("step-*.png"))) == 2
    # an LCM that is fine-tuned has no teacher to be measured against
    lines = (folder / "metrics.jsonl").read_text()
    assert ('"val/rmse_4"' in lines) == (objective != "lcf")
    card = (folder / "README.md").read_text()
    what = {
        "lcm": r"An LCM \(Luo et al. 2023, arXiv:2310.04378\), distilled from",
        "lcf": r"An LCM \(Luo et al. 2023, arXiv:2310.04378\), fine-tuned from",
        "pcm": r"A PCM student \(Wang et al. 2024, arXiv:2405.18407\), distilled from",
        "tdm": r"A TDM student \(Luo et al. 2025, arXiv:2503.06674\), distilled from",
        "tcd": r"A TCD student \(Zheng et al. 2024, arXiv:2402.19159\), distilled from",
        "cd": r"A consistency model \(Song et al. 2023, arXiv:2303.01469\), distilled from",
        "ct": r"A consistency model \(Song et al. 2023, arXiv:2303.01469\), trained from",
        "ict": r"A consistency model \(Song & Dhariwal 2023, arXiv:2310.14189\), trained from",
        "ect": r"A consistency model \(Geng et al. 2024, arXiv:2406.14548\), trained from",
    }
    assert re.search(what[objective], card)
    assert ("Guidance is an input of the network" in card) == LEFT[objective][2]
    assert ("Guidance is baked into the weights" in card) == (objective in ("pcm", "tdm"))
    assert ("negative prompts work, at twice the cost" in card) == (objective in ("cd", "ct", "ict", "ect"))
    assert (", eta=0.3)" in card) == (objective == "tcd")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_tcd_s_map_is_the_scheduler_s_step(kind: Any) -> None:
    """With no fresh noise a step of TCDScheduler goes to the next time; with eta it goes to (1 - eta) of it first."""
    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = vp_schedule(betas)
    g = torch.Generator().manual_seed(0)
    z, output = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    for eta in (0.0, 0.3, 1.0):
        scheduler: Any = TCDScheduler(**betas, prediction_type=kind)
        scheduler.set_timesteps(4)
        t, following = scheduler.timesteps[1], scheduler.timesteps[2]
        _, noised = scheduler.step(output, t, z, eta=eta, generator=g, return_dict=False)
        x0, eps = to_x0_eps(output, z, schedule.alpha(t[None]), schedule.sigma(t[None]), kind)
        end = ((1 - eta) * following[None]).floor().long()
        torch.testing.assert_close(schedule.diffuse(x0, eps, end), noised, rtol=1e-5, atol=1e-5)


def test_a_tcd_lora_is_sampled_by_its_scheduler(tcd_lora: Path, command: Command, tmp_path: Path) -> None:
    found = find_model(str(tcd_lora))
    student = load_student(
        found.path, torch.device("cpu"), found.loras, options=found.options, scheduler=found.scheduler
    )
    assert type(student.scheduler).__name__ == "TCDScheduler"
    with safe_open(found.loras[0], framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.description"].startswith("TCD-LoRA distilled from")
    assert header["modelspec.usage_hint"].startswith("TCD sampler")
    assert header["lcmdistill.scheduler"] == "TCDScheduler"
    alone = load_student(str(found.teacher), torch.device("cpu"), found.loras)  # as --model BASE --lora FILE
    assert type(alone.scheduler).__name__ == "TCDScheduler"
    code, output, _ = command("sample", tcd_lora, "--prompt", "red heart", "--eta", "0.5", "--output", "out")
    assert code == 0, output
    assert "guidance scale 1" in output


def test_a_tcd_lora_is_exported_with_its_scheduler(tcd_lora: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "fp32", "guidance_scale": None, "verify": True}
    export(tcd_lora, "fused", tmp_path / "fused", **options, write_card=put_export_card)
    assert json.loads((tmp_path / "fused" / "model_index.json").read_text())["scheduler"][1] == "TCDScheduler"
    assert ", eta=0.3)" in (tmp_path / "fused" / "README.md").read_text()
    output = export(tcd_lora, "single-file", tmp_path / "a.safetensors", **options)
    assert "sampler TCD with eta 0.3, or LCM if there is no TCD, 4 steps, CFG 1" in output
    assert output.endswith("  diffusers: scheduler TCDScheduler, 4 steps, guidance scale 1, eta 0.3.")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.usage_hint"].startswith("TCD sampler")
    assert header["lcmdistill.recommended_sampler"] == "TCD"
    assert "lcm" not in header["modelspec.tags"]
    assert header["modelspec.description"].startswith("TCD student distilled from small")


def test_a_pcm_lora_is_sampled_by_plain_ddim(method_run: MethodRunner) -> None:
    run = method_run("pcm", student__kind="lora", student__rank=4, objective__phases="2", optim__max_train_steps=1)
    found = find_model(str(run))
    assert (found.steps, found.is_baked, found.scheduler) == (2, True, "DDIMScheduler")
    with safe_open(found.loras[0], framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.usage_hint"].startswith("Euler sampler, 2 steps, CFG 1")
    assert header["modelspec.description"].startswith("PCM-LoRA distilled from")
    for student in (
        load_student(found.path, torch.device("cpu"), found.loras, scheduler=found.scheduler),
        load_student(str(found.teacher), torch.device("cpu"), found.loras),  # as --model BASE --lora FILE
    ):
        config = student.scheduler.config
        assert type(student.scheduler).__name__ == "DDIMScheduler"
        assert (config.timestep_spacing, config.set_alpha_to_one) == ("trailing", True)
        student.scheduler.set_timesteps(2)
        assert student.scheduler.timesteps.tolist() == [999, 499]


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_usage_instructions_name_the_method_s_sampler(objective: str, kind: str) -> None:
    flags = {"student.kind": kind, "teacher.model": "sd15", "run.validation_guidance_scale": 2.0}
    config = resolve({}, {**flags, "objective.name": objective})
    cards = {use["name"]: use for use in uses(Path("runs/x"), config, 4)}
    if objective == "tcd":
        assert "sampler TCD with eta 0.3" in cards["A1111"]["lines"][-1]
        assert "ComfyUI-TCD" in cards["ComfyUI"]["lines"][-1]
    elif objective in ("pcm", "tdm"):
        assert "sampler Euler, schedule type SGM Uniform, 4 steps, CFG 1" in cards["A1111"]["lines"][-1]
        assert "sampler euler, scheduler sgm_uniform, 4 steps, CFG 1" in cards["ComfyUI"]["lines"][-1]
        assert "LCM" not in str(cards)
    else:
        assert "sampler LCM" in cards["A1111"]["lines"][-1]
        assert "TCD" not in str(cards)
    if kind == "lora":
        assert OBJECTIVES[objective].info.scheduler in cards["diffusers"]["code"]
