"""Teachers of flow matching: U-Nets under a flow-matching scheduler are distilled and sampled like others."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from lcmdistill.diffusion.flow import FlowSchedule, sampled_sigmas
from lcmdistill.diffusion.parameterization import FLOW
from lcmdistill.export import EXPORTERS
from lcmdistill.export.sampling_facts import SamplingFacts
from lcmdistill.objectives import flow_scheduler_of, method_sampled_by
from lcmdistill.report.info import describe
from lcmdistill.students.lora_files import scheduler_of
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.pipelines import call_pipeline
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import lora_file
from tests.support.runs import resolve
from tests.support.teachers import SMALL, Command, build_teacher


@pytest.fixture(scope="module")
def flow_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion whose U-Net counts as a velocity network, shift 3."""
    folder = build_teacher(tmp_path_factory.mktemp("flow") / "teacher")
    library: Any = diffusers
    pipeline = library.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.save_pretrained(folder)
    return folder


def test_the_scheduler_decides(flow_teacher: Path) -> None:
    teacher = load_teacher(str(flow_teacher))
    assert (teacher.schedule, teacher.prediction_type) == (FlowSchedule(1000, 3.0), FLOW)
    with pytest.raises(UsageError, match="predicts the velocity, not 'v_prediction'; remove --prediction-type"):
        load_teacher(str(flow_teacher), prediction_type="v_prediction")


def test_the_teacher_is_sampled_along_its_velocity(flow_teacher: Path) -> None:
    teacher = load_teacher(str(flow_teacher))
    z = noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = teacher.generate_latents(["a cat"], noise, steps=3, guidance_scale=2.0, scheduler="DDIMScheduler")
    cond, null = (teacher.encode_prompts([text]).values for text in ("a cat", ""))
    times = FlowSchedule(shift=3.0).grid(4).flip(0)
    for t, s in pairwise(times):
        with torch.no_grad():
            v, u = (teacher.call(teacher.network, z, t[None], c, None) for c in (cond, null))
        z = z + (s - t) / 1000 * (u + 2.0 * (v - u))
    torch.testing.assert_close(images, z, rtol=1e-4, atol=1e-4)


def test_samplers_of_students() -> None:
    euler, lcm = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
    wanted = {"LCMScheduler": lcm, "TCDScheduler": euler, "DDIMScheduler": euler, lcm: lcm, euler: euler}
    assert {name: flow_scheduler_of(name) for name in wanted} == wanted
    method = method_sampled_by(lcm)
    assert method is not None
    assert method.key == "lcm"
    assert method.pipeline_call(2, 1.0).endswith("num_inference_steps=2, sigmas=[1.0, 0.5], guidance_scale=1)")
    assert method_sampled_by(euler) is None  # teachers have it as well


RUNS = [("lcm", "full"), ("lcm", "lora"), ("pcm", "full"), ("pcm", "lora"), ("tcd", "full"), ("tdm", "lora")]


@pytest.mark.parametrize(
    ("objective", "kind"),
    [pytest.param(*run, marks=[pytest.mark.slow] * (i not in (0, 2))) for i, run in enumerate(RUNS)],
)
def test_a_run_from_the_preflight_to_its_images(
    objective: str, kind: str, flow_teacher: Path, image_folder: Path, tmp_path: Path, command: Command
) -> None:
    own = {**SMALL, "optim.batch_size": 2, "run.checkpoint_every": 1, "run.validate_every": 2}
    own |= {"run.validation_prompts": '["a cat"]'} | ({"student.rank": 2} if kind == "lora" else {})
    del own["optim.max_train_steps"]
    base = ["distill-lora" if kind == "lora" else "distill", "--teacher", flow_teacher, "--data", image_folder]
    base += ["--objective", objective, "--output", "run", *(f"--set={key}={value}" for key, value in own.items())]
    for steps in (1, 2):  # the second is a resumed run
        code, output, error = command(*base, "--max-train-steps", steps)
        assert code == 0, error
    assert "resuming from step-00000001" in output
    scheduler = flow_scheduler_of({"lcm": "LCMScheduler", "tcd": "TCDScheduler"}.get(objective, "DDIMScheduler"))
    if kind == "full":
        saved = json.loads((tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
        assert (saved["_class_name"], saved["shift"]) == (scheduler, 3.0)
    else:
        assert scheduler_of(str(lora_file(tmp_path / "run"))) == scheduler
    images = []
    for batch_size in (1, 2):  # the fresh noise of a sampler belongs to an image
        code, _, error = command(
            "sample", "run", "--steps", 2, "--prompt", "a cat", "--num-images", 2, "--batch-size", batch_size,
            "--output", f"images-{batch_size}",
        )  # fmt: skip
        assert code == 0, error
        images.append(sorted(path.read_bytes() for path in Path(f"images-{batch_size}").glob("[0-9]*.png")))
    assert images[0] == images[1]
    code, output, error = command("info", "run")
    assert code == 0, error
    if (objective, kind) == ("lcm", "full"):
        code, _, error = command("evaluate", "run", "--steps", "1,2", "--guidance-scale", 3, "--num-images", 2)
        assert code == 0, error
        assert Path("run/report.html").is_file()
    if kind == "full":
        code, _, error = command("export", "run", "--format", "single-file", "--output", "f.safetensors")
        assert (code, "flow_prediction" in error) == (2, True)


def test_a_call_visits_the_sigmas_that_students_are_trained_at(
    flow_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_teacher(str(flow_teacher)).pipeline
    times: list[float] = []
    forward = pipeline.unet.forward
    monkeypatch.setattr(
        pipeline.unet, "forward", lambda z, t, *a, **k: (times.append(float(t)), forward(z, t, *a, **k))[1]
    )
    kwargs = {"prompt": "a cat", "output_type": "latent", "guidance_scale": 1.0}
    call_pipeline(pipeline, kwargs, steps=4, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor(sampled_sigmas(4))
    assert times == pytest.approx((1000 * 3 * shares / (1 + 2 * shares)).tolist(), rel=1e-5)


def test_other_schedulers_are_refused(flow_teacher: Path, command: Command) -> None:
    code, _, error = command("sample", flow_teacher, "--scheduler", "dpm++", "--prompt", "a cat", "--output", "o")
    assert (code, "not for flow-matching models" in error, "use lcm or euler" in error) == (2, True, True)


def test_the_code_of_a_card_runs(flow_teacher: Path, tmp_path: Path) -> None:
    """diffusers' own pipeline with what the instructions say: other schedulers than its betas' need one value more."""
    facts = SamplingFacts(prediction_type=FLOW)
    config = resolve({}, {"teacher.model": str(flow_teacher), "objective.name": "pcm"})
    usage = EXPORTERS["pipeline"].usage(config, facts, str(flow_teacher), steps=2)
    code = EXPORTERS["pipeline"].python(usage)
    assert "sigmas=[1.0, 0.5]" in code
    values: dict[str, Any] = {}
    exec(code, values)
    assert values["image"].size == (16, 16)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_solver_with_flow_sigmas_is_a_flow_schedule(name: str, flow_teacher: Path, tmp_path: Path) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(flow_teacher)
    # A config keeps the values of the class that it was made from, so `shift` must not be read.
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    pipeline.save_pretrained(tmp_path / "m")
    assert "rectified flow, shift 2, T = 1000" in dict(describe(str(tmp_path / "m")))["schedule"]
    teacher = load_teacher(str(tmp_path / "m"))
    assert (teacher.schedule, teacher.prediction_type) == (FlowSchedule(1000, 2.0), FLOW)
    assert teacher.pipeline.scheduler.config.shift == 2.0
