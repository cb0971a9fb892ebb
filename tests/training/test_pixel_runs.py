"""Teachers in pixel space: how they describe themselves, and that they draw as their papers' samplers do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from lcmdistill.config.schema import StudentConfig
from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.schedules import KarrasSchedule
from lcmdistill.diffusion.types import Conditioning, x0_eps_network
from lcmdistill.students.build import make_student
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.preflight import validate_for_teacher
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.utils.checkpoint import load_checkpoint
from lcmdistill.utils.errors import UsageError
from tests.support.pixel import images
from tests.support.pixel_models import LABELS, build_pixel
from tests.support.runs import distill, resolve
from tests.support.teachers import Command


def run_options(**more: Any) -> dict[str, Any]:
    own = {
        "optim.batch_size": 4,
        "optim.gradient_accumulation_steps": 1,
        "optim.learning_rate": 1e-3,
        "optim.max_train_steps": 2,
    }
    own |= {"run.checkpoint_every": 1, "run.validate_every": 2, "run.log_every": 1}
    return own | {key.replace("__", "."): value for key, value in more.items()}


RUNS = [
    ("cd", "classes", {"objective.scales": 8}),
    ("cd", "VP", {}),
    ("ct", "unconditional", {"student.start": "scratch"}),
    ("ict", "RGB", {}),
    ("ect", "classes", {"objective.stages": 2}),
]


@pytest.mark.parametrize(("objective", "kind", "own"), RUNS, ids=[f"{name}-{kind}" for name, kind, _ in RUNS])
def test_a_run_from_the_preflight_to_its_images(
    objective: str, kind: str, own: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    labels = () if kind == "unconditional" else LABELS
    teacher = build_pixel(tmp_path / "t", labels, channels=3 if kind == "RGB" else 1, vp=kind == "VP")
    folder = images(tmp_path / "images", ["bag", "coat", "bag", "ankle boot", "a cat"])
    sets = [f"--set={key}={value}" for key, value in {**run_options(), **own}.items() if key != "optim.max_train_steps"]
    base = [
        "distill",
        "--teacher",
        teacher,
        "--objective",
        objective,
        "--data",
        folder,
        "--output",
        tmp_path / "run",
        *sets,
    ]
    code, output, error = command(*base, "--dry-run")
    assert code == 0, error
    assert f"{5 if kind == 'unconditional' else 4} kept" in output
    for steps in (1, 2):  # the second is a resumed run
        code, output, error = command(*base, "--max-train-steps", steps)
        assert code == 0, error
    assert "resuming from step-00000001" in output
    assert (tmp_path / "run" / "samples" / "step-000002.png").is_file()
    code, output, error = command("sample", tmp_path / "run", "--steps", 2, "--output", tmp_path / "s")
    assert code == 0, error
    drawn = sorted((tmp_path / "s").glob("[!g]*.png"), key=lambda path: path.stem.partition("seed-")[2])
    assert drawn[0].name.startswith("000-image-1_2-steps" if kind == "unconditional" else "000-coat_2-steps")
    assert len(drawn) == (4 if kind == "unconditional" else 3)
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    scheduler = "LCMScheduler" if kind == "VP" else "CMStochasticIterativeScheduler"
    assert (index["_class_name"], index["scheduler"][1]) == ("ConsistencyModelPipeline", scheduler)


def finished_run(folder: Path, teacher: Path, objective: str = "cd", **more: Any) -> Path:
    """A run of two steps on images that the teacher draws itself, at a learning rate that shows."""
    own = run_options(data__teacher_steps=2, run__validate_every=0, optim__learning_rate=1e-2, **more)
    own |= {"teacher.model": str(teacher), "run.output": str(folder), "objective.name": objective}
    return distill(resolve({}, own))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_plain_diffusers_samples_the_trained_consistency_function(
    tmp_path: Path, labels: tuple[str, ...], steps: int
) -> None:
    """The run's pipeline against Song et al. 2023, Alg. 1, written on f as it is trained."""
    model = build_pixel(tmp_path / "t", labels)
    run, teacher = finished_run(tmp_path / "run", model), load_teacher(str(model))
    pipeline: Any = DiffusionPipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert any(
        not torch.equal(a, b) for a, b in zip(pipeline.unet.parameters(), teacher.network.parameters(), strict=True)
    )
    schedule, c = KarrasSchedule(), teacher.encode_prompts(["bag", "coat"])

    def raw(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return teacher.call(pipeline.unet, z, t, c.values, w)

    network = x0_eps_network(raw, schedule, teacher.prediction_type)

    @torch.no_grad()
    def f(z: Tensor, t: float) -> Tensor:
        times = torch.full((2,), t)
        return consistency_function(schedule, z, network(z, times, c, None).x0, times).clamp(-1, 1)

    first, fresh = (torch.Generator().manual_seed(seed) for seed in (3, 3))
    options = {"class_labels": c["class_labels"]} if labels else {}
    drawn = pipeline(2, num_inference_steps=steps, generator=first, output_type="pt", **options).images
    x = f(schedule.sigma_max * torch.randn(2, 1, 8, 8, generator=fresh), schedule.sigma_max)
    if steps == 2:
        t = float(schedule.grid(schedule.num_steps)[schedule.num_steps - 1 - schedule.num_steps // 2])
        noise = torch.randn(2, 1, 8, 8, generator=fresh)
        x = f(x + (t**2 - schedule.sigma_min**2) ** 0.5 * noise, t)
    torch.testing.assert_close(drawn, (x + 1) / 2, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path: Path) -> None:
    teacher = build_pixel(tmp_path / "t", dropout=0.2)
    for objective in ("cd", "ct"):
        own = {"data__max_samples": 16}
        own |= {"objective__curriculum_steps": 4} if objective == "ct" else {}
        parts = tmp_path / f"{objective}-parts"
        whole = finished_run(tmp_path / f"{objective}-all", teacher, objective, optim__max_train_steps=4, **own)
        for steps in (2, 4):
            finished_run(parts, teacher, objective, optim__max_train_steps=steps, **own)
        a, b = (load_checkpoint(run / "checkpoints" / "step-00000004")[0] for run in (whole, parts))
        for group in a:
            assert all(torch.equal(value, b[group][name]) for name, value in a[group].items())


def test_a_student_from_scratch_has_weights_of_its_own(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    made = [
        make_student(
            teacher,
            StudentConfig(start="scratch"),
            dtype=torch.float32,
            seed=seed,
            checkpointing=False,
            omega="none",
        ).network.state_dict()
        for seed in (1, 1, 2)
    ]
    for name, value in teacher.network.state_dict().items():
        if "norm" in name:
            assert torch.equal(made[0][name], torch.full_like(value, float(name.endswith("weight"))))
        else:
            assert torch.equal(made[0][name], made[1][name])
            assert not torch.equal(made[0][name], made[2][name])
            assert not torch.equal(made[0][name], value)
    reference = type(teacher.network).from_config(teacher.network.config).state_dict()  # torch's own defaults
    for name, value in reference.items():
        if value.numel() > 200:
            assert float(made[0][name].std()) == pytest.approx(float(value.std()), rel=0.25), name


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"objective.name": "lcm"}, "--objective lcm is for latent models; in pixel space use cd, ct, ict or ect"),
        ({"objective.name": "tcd"}, "--objective tcd is for latent models"),
        ({"student.kind": "lora"}, "LoRA is not supported for pixel-space teachers"),
        ({"objective.distance": "lpips", "objective.lpips_weights": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"objective.distance": "lpips", "objective.lpips_weights": __file__}, "does not hold AlexNet's weights"),
    ],
)
def test_what_has_no_effect_in_pixel_space_is_refused(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    model = str(build_pixel(tmp_path / "t"))
    teacher = load_teacher(model)
    config = resolve_run_defaults(resolve({}, {"teacher.model": model, "objective.name": "cd", **own}), 1, teacher)
    with pytest.raises(UsageError, match=message):
        validate_for_teacher(config, teacher)


def test_an_unknown_class_and_another_size_are_refused(tmp_path: Path, command: Command) -> None:
    run = finished_run(tmp_path / "run", build_pixel(tmp_path / "t"))
    code, _, error = command("sample", run, "--prompt", "a cat")
    assert (code, error.strip()) == (
        2,
        "Error: 'a cat' is not a class of this model; choose from coat, Ankle boot, bag",
    )
    code, _, error = command("sample", run, "--prompt", "bag", "--resolution", 16)
    assert (code, error.strip()) == (2, "Error: --resolution is 16; this model generates only 8x8 px")


@pytest.mark.parametrize("options", [["--guidance-scale", 3], ["--negative-prompt", "coat", "--guidance-scale", 3]])
def test_guidance_which_pixel_space_has_none_of_is_refused(
    tmp_path: Path, command: Command, options: list[Any]
) -> None:
    run = finished_run(tmp_path / "run", build_pixel(tmp_path / "t"))
    code, _, error = command("sample", run, "--prompt", "bag", *options)
    assert (code, f"{options[0]} has no effect on a consistency model in pixel space" in error) == (2, True)
