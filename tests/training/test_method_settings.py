"""Every objective as a run: distilled, resumed, sampled, and what becomes of its guidance."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmdistill.evaluation.evaluate import evaluate
from lcmdistill.evaluation.options import EvaluationOptions
from lcmdistill.evaluation.results import read_results
from lcmdistill.export.registry import export
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.sampling.generate import find_model, load_student
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.pipelines import extra_call_kwargs
from lcmdistill.utils.errors import UsageError
from tests.support.images import newest_image
from tests.support.methods import MethodRunner, index
from tests.support.teachers import Command
from tests.support.training import losses


def test_eta_is_passed_on_and_zero_adds_no_noise(method_run: MethodRunner) -> None:
    pipeline = load_student(find_model(str(method_run("tcd", optim__max_train_steps=1))).path, torch.device("cpu"))

    def pictures(seed: int, eta: float | None) -> bytes:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
        image = pipeline(
            "red heart",
            num_inference_steps=3,
            guidance_scale=3.0,
            latents=latents,
            generator=torch.Generator().manual_seed(seed),
            **extra_call_kwargs(pipeline, 1, 16, 16) | ({} if eta is None else {"eta": eta}),
        ).images[0]
        return image.tobytes()

    assert pictures(0, 0.0) == pictures(1, 0.0)
    assert len({pictures(0, 0.0), pictures(0, 0.3), pictures(1, 0.3), pictures(0, 1.0)}) == 4
    assert pictures(0, None) == pictures(0, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eta", 0.3], "--eta is for a TCDScheduler, and this model has LCMScheduler"),
        (["--negative-prompt", "blue"], "no effect on this model, whose guidance is an input of the network"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    small_run: Path, command: Command, options: list[Any], message: str
) -> None:
    code, _, error = command("sample", small_run, *options)
    assert code == 2
    assert message in error


def test_an_eta_out_of_range_is_refused(tcd_lora: Path, command: Command) -> None:
    code, _, error = command("sample", tcd_lora, "--eta", 1.5)
    assert (code, "it must be from 0 (no fresh noise) to 1" in error) == (2, True)


@pytest.mark.parametrize(("objective", "kind"), [("lcm", "full"), ("tcd", "full"), ("lcm", "lora"), ("cd", "full")])
def test_negative_prompts_act_where_guidance_is_free(
    method_run: MethodRunner, command: Command, objective: str, kind: str
) -> None:
    free = {} if objective == "cd" else {"objective__guidance": "free"}
    lora = {"student__kind": "lora", "student__rank": 4, "student__alpha": 4.0} if kind == "lora" else {}
    folder = method_run(objective, optim__max_train_steps=2, **free, **lora)
    assert require_run_config(folder).run.validation_guidance_scale == 2.0
    pictures = []
    for i, more in enumerate(([], ["--negative-prompt", "blue sky"], ["--guidance-scale", 4])):
        code, output, error = command("sample", folder, "--prompt", "red heart", "--output", f"out{i}", *more)
        assert code == 0, output + error
        pictures.append(newest_image(Path(f"out{i}")).read_bytes())
    assert len(set(pictures)) == 3
    code, _, error = command("sample", folder, "--negative-prompt", "blue", "--guidance-scale", 1)
    assert (code, "has no effect at guidance scale 1" in error) == (2, True)


def test_lcf_starts_at_the_lcm_that_it_is_given(method_run: MethodRunner, small_run: Path) -> None:
    folder = method_run("lcf", optim__max_train_steps=1, optim__learning_rate=0.0)
    before, after = (load_teacher(str(f)).network.state_dict() for f in (small_run, folder))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_lcf_keeps_free_guidance(method_run: MethodRunner, command: Command, tmp_path: Path) -> None:
    start = method_run("lcm", "free", objective__guidance="free", optim__max_train_steps=1)
    folder = method_run("lcf", "tuned", teacher__model=str(start / "pipeline"), optim__max_train_steps=1)
    config = require_run_config(folder)
    assert (config.objective.guidance, config.data.caption_drop) == ("free", 0.1)
    assert config.run.validation_guidance_scale == 2.0
    code, output, _ = command("info", folder)
    assert (code, bool(re.search(r"guidance +free: CFG", output))) == (0, True)
    (start / "pipeline").rename(tmp_path / "of-nobody")
    again = method_run("lcf", "baked", teacher__model=str(tmp_path / "of-nobody"), optim__max_train_steps=1)
    assert require_run_config(again).objective.guidance == "baked"
    assert re.search(r"guidance +as in the starting model", command("info", again)[1])
    code, output, error = command(
        "sample", folder, "--prompt", "red heart", "--negative-prompt", "blue", "--output", "out"
    )
    assert code == 0, output + error


def test_lcf_takes_a_pipeline_and_an_lcm_lora_that_is_fused(
    method_run: MethodRunner, small_run: Path, tmp_path: Path
) -> None:
    method_run("lcf", "of-pipeline", teacher__model=str(small_run / "pipeline"), optim__max_train_steps=1)
    lora = method_run(
        "lcm", "lora", student__kind="lora", student__rank=4, student__alpha=4.0, optim__max_train_steps=1
    )
    with pytest.raises(UsageError, match=f"is a LoRA run; merge it with its base first: lcmdistill export {lora}"):
        method_run("lcf", "of-lora", teacher__model=str(lora))
    export(lora, "fused", tmp_path / "fused", dtype="fp32", guidance_scale=None, verify=False)
    folder = method_run("lcf", "of-fused", teacher__model=str(tmp_path / "fused"), optim__max_train_steps=1)
    assert index(folder)["_class_name"] == "StableDiffusionPipeline"
    assert require_run_config(folder).run.validation_guidance_scale == 1.0
    card = (folder / "README.md").read_text().partition("## Configuration")[0]
    assert "- guidance as in the starting model\n" in card  # no omega was given
    assert "omega 5" not in card


def test_a_tcd_student_with_an_omega_input_is_not_an_lcm(method_run: MethodRunner) -> None:
    of_tcd = method_run("tcd", "of-tcd", optim__max_train_steps=1)
    with pytest.raises(UsageError, match="of-tcd is a TCD student, which learned another map; name a run"):
        method_run("lcf", teacher__model=str(of_tcd))


def test_a_lora_can_be_fine_tuned_on_an_lcm(method_run: MethodRunner, command: Command) -> None:
    lora = {"student__kind": "lora", "student__rank": 4, "student__alpha": 4.0}
    folder = method_run("lcf", "style", **lora)
    code, output, error = command("sample", folder, "--prompt", "red heart", "--output", "out")
    assert code == 0, output + error


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("lcf", {"teacher__model": "TEACHER"}, "fine-tunes an LCM, and .* is none"),
        (
            "lcf",
            {"objective__guidance": "free"},
            "has an omega input: its guidance is in its weights; remove --guidance",
        ),
        (
            "lcf",
            {"student__start": "scratch"},
            "start is scratch, but --objective lcf fine-tunes an LCM; remove student.start",
        ),
        ("lcf", {"data__sources": ("teacher",)}, "trains on your own images; pass them with --data"),
        ("lcm", {"teacher__model": "RUN"}, "is already a few-step model and has no ODE to distill"),
        ("ct", {"objective__distance": "lpips", "objective__lpips_weights": "x.pth"}, "works on latents; try huber"),
    ],
)
def test_a_method_that_does_not_fit_its_start_is_refused(
    method_run: MethodRunner,
    small_teacher: Path,
    small_run: Path,
    objective: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    places = {"TEACHER": str(small_teacher), "RUN": str(small_run)}
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UsageError, match=message):
        method_run(objective, **changes)


def test_a_curriculum_is_as_long_as_the_run_and_keeps_its_length(
    method_run: MethodRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = method_run("ct")
    assert require_run_config(folder).objective.curriculum_steps == 4
    method_run("ct", optim__max_train_steps=6)
    assert require_run_config(folder).objective.curriculum_steps == 4
    with pytest.raises(UsageError, match=r"objective\.curriculum_steps = 4 \(this command: 9\)"):
        method_run("ct", optim__max_train_steps=8, objective__curriculum_steps=9)


def test_the_curriculum_moves_the_target_s_rate(method_run: MethodRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcmdistill.students import student

    rates: list[float] = []
    monkeypatch.setattr(student, "ema_update", lambda target, online, mu: rates.append(mu))
    method_run("ct", objective__s1=5)
    objective = OBJECTIVES["ct"](s1=5, curriculum_steps=4)
    assert rates == [objective.ema_decay_at(step) for step in range(4)]
    assert len(set(rates)) == 4


def test_dropout_of_an_adapter_acts_on_both_sides_alike(method_run: MethodRunner) -> None:
    """With the target at the student and z_s at z_t, only dropout could tell them apart."""
    lora = {"student__kind": "lora", "student__rank": 4, "student__alpha": 4.0, "student__dropout": 0.5}
    lora |= {"optim__learning_rate": 0.1, "optim__max_train_steps": 3, "student__target": "live"}
    with_dropout = losses(method_run("cd", "a", **lora))
    assert with_dropout != losses(method_run("cd", "b", **{**lora, "student__dropout": 0.0}))
    assert with_dropout == losses(method_run("cd", "c", **lora))


@pytest.mark.parametrize(
    ("objective", "kind", "scales"),
    [
        pytest.param("tcd", "full", (4.0, 3.0), id="omega is an input", marks=pytest.mark.slow),
        pytest.param("cd", "full", (2.0,), id="no guidance", marks=pytest.mark.slow),
        pytest.param("lcm", "lora", (2.0,), id="a LoRA of free guidance"),
    ],
)
def test_a_run_is_measured_at_the_guidance_that_acts(
    method_run: MethodRunner, objective: str, kind: str, scales: tuple[float, ...]
) -> None:
    own: dict[str, Any] = {"objective__w_min": 2.0, "objective__w_max": 3.0} if objective == "tcd" else {}
    if kind == "lora":
        own = {"student__kind": "lora", "student__rank": 4, "student__alpha": 4.0, "objective__guidance": "free"}
    own |= {"run__validation_guidance_scale": 4.0} if objective == "tcd" else {}
    folder = method_run(objective, optim__max_train_steps=1, **own)
    evaluate([folder], EvaluationOptions(steps=(1, 2), num_images=2, device="cpu"))
    found = read_results(folder)
    assert found is not None
    assert tuple(found.info["guidance_scales"]) == scales
    drawn = [found.number("rmse", "student", steps, scale) for steps in (1, 2) for scale in scales]
    assert len({value for value in drawn if value is not None}) == len(drawn)


@pytest.mark.parametrize(("scale", "is_reported"), [(4.0, True), (1.0, False)])
def test_guidance_on_top_of_baked_guidance_is_reported(
    command: Command, small_teacher: Path, image_folder: Path, scale: float, is_reported: bool
) -> None:
    data = ["--teacher", small_teacher, "--data", image_folder, "--resolution", 16]
    code, output, error = command(
        "distill-lora", *data, "--rank", 4, "--set", f"run.validation_guidance_scale={scale}", "--dry-run"
    )
    assert (code, f"run.validation_guidance_scale is {scale:g}, but the student's" in output + error) == (
        0,
        is_reported,
    )


def test_what_has_no_teacher_is_not_measured_against_one(method_run: MethodRunner) -> None:
    folder = method_run("lcf", optim__max_train_steps=1)
    with pytest.raises(UsageError, match="was fine-tuned without a teacher"):
        evaluate([folder], EvaluationOptions(steps=(1,), num_images=2, device="cpu"))


@pytest.mark.parametrize(("objective", "forwards"), [("lcf", 4), ("tcd", 6), ("ct", 4)])
def test_a_dry_run_prints_the_method_s_settings(
    command: Command, small_teacher: Path, small_run: Path, image_folder: Path, objective: str, forwards: int
) -> None:
    start = small_run if objective == "lcf" else small_teacher
    code, output, error = command(
        "distill",
        "--dry-run",
        "--full",
        "--objective",
        objective,
        "--teacher",
        start,
        "--data",
        image_folder,
        "--output",
        "out",
    )
    assert code == 0, error
    assert f'name = "{objective}"' in output
    assert "dry run: nothing was written" in output
    asked = OBJECTIVES[objective]().num_forwards
    assert 3 * asked["student"] + asked["teacher"] + asked["target"] == forwards
