"""Teachers in pixel space: how they describe themselves, and that they draw as their papers' samplers do."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from pixel_models import LABELS, build_pixel
from torch import Tensor

from lcmdistill.config.resolve import resolve
from lcmdistill.config.schema import DataConfig, StudentConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import prepare
from lcmdistill.data.survey import survey
from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.parameterization import EDM
from lcmdistill.diffusion.schedules import KarrasSchedule, VPSchedule
from lcmdistill.diffusion.types import Conditioning, x0_eps_network
from lcmdistill.students.build import make_student
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.pixel import class_names
from lcmdistill.training.preflight import check_early, guard
from lcmdistill.training.run_settings import settle
from lcmdistill.training.trainer import distill
from lcmdistill.utils.checkpoint import load_checkpoint
from lcmdistill.utils.errors import UsageError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rescheduled(folder: Path, **changes: Any) -> Path:
    """A teacher's folder with its scheduler's config changed."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_a_teacher_is_read_from_its_files(tmp_path: Path, labels: tuple[str, ...], channels: int) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", labels, channels=channels)))
    assert (teacher.prediction_type, teacher.schedule) == (EDM, KarrasSchedule())
    assert (teacher.vae_factor, teacher.vae.config.latent_channels) == (1, channels)
    assert class_names(teacher.network) == labels
    z, t, c = teacher.example(2, 8, "cpu")
    assert teacher.call(teacher.network, z, t, c.values, None).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_latents_are_the_pixels(tmp_path: Path, channels: int) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", channels=channels)))
    pixels = noise(2, channels, 8, 8).clamp(-1, 1).expand(-1, 3, -1, -1)
    mean, std = teacher.encode_images(pixels)
    torch.testing.assert_close(mean, pixels[:, :channels])
    assert not std.any()
    torch.testing.assert_close(teacher.decode(mean), (pixels + 1) / 2)


def test_prompts_are_the_names_of_classes(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    assert teacher.encode_prompts(["bag", "ankle boot", "", "COAT"])["class_labels"].tolist() == [2, 1, 3, 0]
    with pytest.raises(UsageError, match="'a cat' is no class of this model; choose from coat, Ankle boot, bag"):
        teacher.encode_prompts(["bag", "a cat"])
    nameless = load_teacher(str(build_pixel(tmp_path / "n", (), num_class_embeds=4)))
    assert nameless.encode_prompts(["3", "0"])["class_labels"].tolist() == [3, 0]
    told = nameless.encode_prompts(["2"])
    assert told.with_prompt(nameless.encode_prompts([""])).values == told.values  # no class stands for none
    assert nameless.example(2, 8, "cpu")[2]["class_labels"].tolist() == [0, 0]
    plain = load_teacher(str(build_pixel(tmp_path / "u", ())))
    assert not plain.encode_prompts(["anything at all", ""]).values


def test_what_prompts_mean_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    variants = [LABELS, LABELS[::-1], ()]
    folders = [build_pixel(tmp_path / str(i), labels) for i, labels in enumerate(variants)]
    folders.append(build_pixel(tmp_path / "rgb", channels=3))
    prints = {load_teacher(str(folder)).fingerprint(with_network=False) for folder in folders}
    assert len(prints) == len(folders)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_timestep_scale": None}, "250 ln"),
        ({"sigma_data": 1.0}, "sigma_data is 1.0"),
        ({"prediction_type": "v_prediction"}, "epsilon as its prediction_type"),
    ],
)
def test_another_preconditioning_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(str(rescheduled(build_pixel(tmp_path / "t"), **changes)))


def test_a_network_of_other_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes 3 channels and gives 6"):
        load_teacher(str(build_pixel(tmp_path / "t", channels=3, out_channels=6)))


# -- what it draws -----------------------------------------------------------------------------------------------------


def edm_sampler(unet: Any, labels: Tensor | None, latents: Tensor, steps: int) -> Tensor:
    """Karras et al. 2022, Alg. 1 and Table 1, written out as in the paper, in float64."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        sd = 0.5
        c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
        c_in, c_noise = 1 / math.sqrt(sd**2 + sigma**2), math.log(sigma) / 4
        time = torch.full((len(x),), 1000 * c_noise)
        with torch.no_grad():
            return c_skip * x + c_out * unet((c_in * x).float(), time, labels, return_dict=False)[0].double()

    rho, low, high = 7, 0.002, 80
    t = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    t.append(0.0)
    x = latents.double() * t[0]
    for i in range(steps):
        d = (x - denoise(x, t[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_next = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d / 2 + d_next / 2)
        x = x_next
    return x.float()


@pytest.mark.parametrize("steps", [2, 6, 18])
@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_a_teacher_draws_as_edm_does(tmp_path: Path, labels: tuple[str, ...], steps: int) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", labels)))
    start, classes = noise(3, 1, 8, 8), torch.tensor([2, 0, 3]) if labels else None
    drawn = teacher.draw_latents(["bag", "coat", ""], start, steps=steps, guidance_scale=1.0, scheduler="any")
    torch.testing.assert_close(drawn, edm_sampler(teacher.network, classes, start, steps), rtol=1e-3, atol=1e-3)


def test_guidance_acts_between_a_class_and_no_class(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    start = noise(1, 1, 8, 8).expand(2, -1, -1, -1)
    plain, guided = (
        teacher.draw_latents(["bag", ""], start, steps=4, guidance_scale=scale, scheduler="any") for scale in (1.0, 3.0)
    )
    assert (plain[0] - guided[0]).abs().max() > 1e-3
    torch.testing.assert_close(plain[1], guided[1], rtol=1e-4, atol=1e-4)


def test_a_vp_network_of_pixels_is_a_teacher_too(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", channels=3, vp=True)))
    assert teacher.prediction_type == "epsilon"
    assert isinstance(teacher.schedule, VPSchedule)
    drawn = teacher.draw_latents(["bag"], noise(1, 3, 8, 8), steps=3, guidance_scale=1.0, scheduler="any")
    assert drawn.shape == (1, 3, 8, 8)
    assert drawn.isfinite().all()


# -- data --------------------------------------------------------------------------------------------------------------


def images(folder: Path, captions: list[str | None], side: int = 8) -> Path:
    """A folder of grey images, the i-th of brightness 20 i, with captions beside those that have one."""
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.new("L", (side, side), 20 * i).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)
    return folder


def test_captions_are_classes_and_others_are_counted(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t")))
    folder = images(tmp_path / "images", ["Bag", "a cat", " ankle  boot", None, "bag", ""])
    config = DataConfig(sources=(str(folder),), resolution=8, cache_dir=str(tmp_path / "cache"))
    (report,) = survey(config, 0, seconds=9.0, refuses=teacher.refuses)
    assert str(report) == "3 kept, 3 dropped: 3 x caption names no class of the teacher"
    dataset = LatentDataset([prepare(str(folder), config, teacher, 0)], [None])
    assert str(dataset.reports[0]) == str(report)
    mean, std, cond = dataset.read(range(3))
    assert {(round(float(m.mean() + 1) * 127.5), int(c)) for m, c in zip(mean, cond["class_labels"], strict=True)} == {
        (0, 2),
        (40, 1),
        (80, 2),
    }
    assert mean.shape == (3, 1, 8, 8)
    assert not std.any()


def test_an_unconditional_network_needs_no_captions(tmp_path: Path) -> None:
    model, folder = build_pixel(tmp_path / "t", ()), images(tmp_path / "images", [None, "a cat", None])
    own = {"data.cache_dir": str(tmp_path / "cache"), "run.output": str(tmp_path / "run")}
    config = resolve({}, {"teacher.model": str(model), "data.sources": (str(folder),), **own})
    check_early(config)
    teacher = load_teacher(str(model))
    config = settle(config, 1, teacher)
    assert (config.data.resolution, config.data.guidance_scale) == (8, 1.0)
    dataset = LatentDataset([prepare(str(folder), config.data, teacher, 0)], [None])
    mean, _, cond = dataset.read([0, 2])
    assert (len(dataset), mean.shape, cond.values) == (3, (2, 1, 8, 8), {})
    with pytest.raises(UsageError, match=r"2 x no caption|3 x no caption"):
        survey(DataConfig(sources=(str(images(tmp_path / "more", [None, None])),)), 0, seconds=9.0)


@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_a_teacher_without_data_draws_its_own_classes(tmp_path: Path, labels: tuple[str, ...]) -> None:
    teacher = load_teacher(str(build_pixel(tmp_path / "t", labels)))
    own: dict[str, Any] = {"resolution": 8, "draw_steps": 3, "guidance_scale": 1.0, "count": 7}
    config = DataConfig(sources=("teacher",), cache_dir=str(tmp_path / "cache"), **own)
    dataset = LatentDataset([prepare("teacher", config, teacher, 0)], [7])
    mean, _, cond = dataset.read(range(7))
    assert len(mean.flatten(1).unique(dim=0)) == 7
    if labels:
        assert cond["class_labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_another_size_than_the_teacher_s_is_refused(tmp_path: Path) -> None:
    model = str(build_pixel(tmp_path / "t"))
    config = resolve({}, {"teacher.model": model, "data.resolution": 16})
    with pytest.raises(UsageError, match="draws pixels at 8: pass --resolution 8"):
        guard(config, load_teacher(model))


# -- runs --------------------------------------------------------------------------------------------------------------


def run_options(**more: Any) -> dict[str, Any]:
    own = {"optim.batch_size": 4, "optim.accumulate": 1, "optim.learning_rate": 1e-3, "optim.max_train_steps": 2}
    own |= {"run.checkpoint_every": 1, "run.validate_every": 2, "run.log_every": 1}
    return own | {key.replace("__", "."): value for key, value in more.items()}


RUNS = [
    ("cd", "classes", {"objective.scales": 8}),
    ("cd", "VP", {}),
    ("ct", "unconditional", {"student.start": "scratch"}),
    ("ict", "RGB", {}),
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
    code, told, error = command(*base, "--dry-run")
    assert code == 0, error
    assert f"{5 if kind == 'unconditional' else 4} kept" in told
    for steps in (1, 2):  # the second is a resumed run
        code, told, error = command(*base, "--max-train-steps", steps)
        assert code == 0, error
    assert "resuming from step-00000001" in told
    assert (tmp_path / "run" / "samples" / "step-000002.png").is_file()
    code, told, error = command("sample", tmp_path / "run", "--steps", 2, "--output", tmp_path / "s")
    assert code == 0, error
    drawn = sorted(path.name for path in (tmp_path / "s").glob("0*.png"))
    assert drawn[0] == ("000-image-1.png" if kind == "unconditional" else "000-coat.png")
    assert len(drawn) == (4 if kind == "unconditional" else 3)
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    scheduler = "LCMScheduler" if kind == "VP" else "CMStochasticIterativeScheduler"
    assert (index["_class_name"], index["scheduler"][1]) == ("ConsistencyModelPipeline", scheduler)


def finished_run(folder: Path, teacher: Path, objective: str = "cd", **more: Any) -> Path:
    """A run of two steps on images that the teacher draws itself, at a learning rate that shows."""
    own = run_options(data__draw_steps=2, run__validate_every=0, optim__learning_rate=1e-2, **more)
    own |= {"teacher.model": str(teacher), "run.output": str(folder), "objective.name": objective}
    return distill(resolve({}, own))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("labels", [LABELS, ()], ids=["classes", "unconditional"])
def test_plain_diffusers_draws_the_trained_consistency_function(
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
        own = {"data__count": 16}
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
        ({"objective.name": "lcm"}, "--objective lcm is for latent models; in pixel space use cd, ct or ict"),
        ({"objective.name": "tcd"}, "--objective tcd is for latent models"),
        ({"student.kind": "lora"}, "no LoRA format that any program reads"),
        ({"objective.distance": "lpips", "objective.lpips_weights": "nowhere.pth"}, "nowhere.pth is not there"),
        ({"objective.distance": "lpips", "objective.lpips_weights": __file__}, "does not hold AlexNet's weights"),
    ],
)
def test_what_pixel_space_has_no_use_for_is_refused(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    model = str(build_pixel(tmp_path / "t"))
    teacher = load_teacher(model)
    config = settle(resolve({}, {"teacher.model": model, "objective.name": "cd", **own}), 1, teacher)
    with pytest.raises(UsageError, match=message):
        guard(config, teacher)


def test_a_name_that_is_no_class_and_another_size_are_refused(tmp_path: Path, command: Command) -> None:
    run = finished_run(tmp_path / "run", build_pixel(tmp_path / "t"))
    code, _, error = command("sample", run, "--prompt", "a cat")
    assert (code, error.strip()) == (
        2,
        "Error: 'a cat' is no class of this model; choose from coat, Ankle boot, bag",
    )
    code, _, error = command("sample", run, "--prompt", "bag", "--resolution", 16)
    assert (code, error.strip()) == (2, "Error: --resolution is 16; this model draws at 8 and nothing else")


@pytest.mark.parametrize("options", [["--guidance-scale", 3], ["--negative-prompt", "coat", "--guidance-scale", 3]])
def test_guidance_which_pixel_space_has_none_of_is_refused(
    tmp_path: Path, command: Command, options: list[Any]
) -> None:
    run = finished_run(tmp_path / "run", build_pixel(tmp_path / "t"))
    code, _, error = command("sample", run, "--prompt", "bag", *options)
    assert (code, f"{options[0]} has no effect on a consistency model in pixel space" in error) == (2, True)
