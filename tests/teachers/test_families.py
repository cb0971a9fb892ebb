"""Every family of teachers, as a small random model of its real classes: from the preflight to what is exported."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from lcmdistill.config.schema import DataConfig, StudentConfig
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.transforms import transform
from lcmdistill.diffusion.flow import sampled_sigmas
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, Conditioning, TeacherNetwork, x0_eps_network
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.students.build import make_student
from lcmdistill.students.student import raw_network
from lcmdistill.teachers.base import SampleInfo, Teacher
from lcmdistill.teachers.inpaint import draw_mask
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.single_file.inspect import read_header
from lcmdistill.utils.errors import UsageError
from tests.support.data import prepared
from tests.support.images import newest_image
from tests.support.models import FAMILY_BUILDERS
from tests.support.oracle import Networks
from tests.support.teachers import SMALL, Command, edited

each_family = pytest.mark.parametrize("family", list(FAMILY_BUILDERS))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> diffusers folder of a small random model."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        return {name: build(tmp_path_factory.mktemp(name) / "model") for name, build in FAMILY_BUILDERS.items()}


# What applies besides the pipeline; the formats of the other families have a test of their own, test_formats.
EXPORTS = {
    ("inpainting", "full"): ("pipeline", "single-file"),
    ("inpainting", "lora"): ("kohya", "peft"),
    ("ssd1b", "full"): ("pipeline", "single-file"),
    ("ssd1b", "lora"): ("kohya", "single-file"),
    ("sd3", "full"): ("pipeline", "single-file"),
    ("sd3", "lora"): ("diffusers-lora", "peft", "fused"),
    ("sana", "full"): ("pipeline",),
    ("sana", "lora"): ("diffusers-lora", "peft", "fused"),
    ("flux", "lora"): ("diffusers-lora", "peft", "fused"),
    ("pixart", "full"): ("pipeline",),
    ("pixart", "lora"): ("peft", "fused"),
}

SLOW = {
    *((name, "full") for name in ("ssd1b", "sdxl", "sana", "pixart")),
    *((name, "lora") for name in FAMILY_BUILDERS if name not in ("sdxl", "sd3", "sana", "pixart")),
}


# SDXL's inpainting is SDXL and inpainting, both of which are run. The quick tests train one kind of student of each
# family, and both of SD 3. FLUX.1 is trained in test_flux.py. SSD-1B, which is SDXL with other numbers of layers, is in the
# slow ones.
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(
            name,
            kind,
            marks=[pytest.mark.slow] * ((name, kind) in SLOW),
        )
        for name in FAMILY_BUILDERS
        if name != "sdxl-inpainting"
        for kind in ("full", "lora")
        if (name, kind) != ("flux", "full")  # refused
    ],
)
def test_a_run_from_the_preflight_to_its_images(
    family: str, kind: str, folders: dict[str, Path], image_folder: Path, tmp_path: Path, command: Command
) -> None:
    name = "distill-lora" if kind == "lora" else "distill"
    own = {**SMALL, "data.resolution": 32, "optim.batch_size": 2, "optim.max_train_steps": 2, "run.checkpoint_every": 1}
    own |= {"run.validate_every": 2, "run.validation_prompts": '["a cat"]'}
    own |= {"student.rank": 2, "student.alpha": 1.0} if kind == "lora" else {}
    # The omega of transformers is their own published one: these networks have no input for a range.
    is_transformer = family in ("sd3", "sana", "flux", "pixart")
    left_out = ("optim.max_train_steps", *(("objective.w_min", "objective.w_max") if is_transformer else ()))
    sets = [f"--set={key}={value}" for key, value in own.items() if key not in left_out]
    base = [name, "--teacher", folders[family], "--data", image_folder, "--output", tmp_path / "run", *sets]
    code, output, error = command(*base, "--dry-run")
    assert code == 0, error
    assert "memory, estimated" in output
    for steps in (1, 2):  # the second is a resumed run
        code, output, error = command(*base, "--max-train-steps", steps)
        assert code == 0, error
        print(output)
    assert "resuming from step-00000001" in output
    assert (tmp_path / "run" / "samples" / "step-000002.png").is_file()
    code, output, error = command(
        "sample", tmp_path / "run", "--steps", 2, "--prompt", "a cat", "--output", tmp_path / "s"
    )
    assert code == 0, error
    for form in EXPORTS.get((family, kind), ()):
        path = tmp_path / (f"{form}.safetensors" if form in ("kohya", "single-file") else form)
        code, output, error = command("export", tmp_path / "run", "--format", form, "--output", path, "--dtype", "fp32")
        assert code == 0, error
        assert "reloaded, largest difference" in output
        if path.suffix and family == "inpainting":
            architecture = read_header(path).metadata["modelspec.architecture"]
            assert architecture == "stable-diffusion-v1-inpainting" + "/lora" * (kind == "lora")
    if (family, kind) == ("pixart", "lora"):
        code, _, error = command(
            "export", tmp_path / "run", "--format", "kohya", "--output", tmp_path / "k.safetensors"
        )
        assert (code, "use --format peft" in error) == (2, True)


def guided_by_hand(teacher: Teacher, prompt: str, noise: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    """DDIM under guidance, written on the teacher's own network, conditioning and null: what its pipeline generates."""
    import diffusers

    scheduler: Any = diffusers.DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    if teacher.is_flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(teacher.pipeline.scheduler.config)
        scheduler.set_timesteps(sigmas=sampled_sigmas(steps))
    side = noise.shape[-1] * teacher.vae_factor
    blank = teacher.example(1, side, "cpu")[2]
    if "mask" in blank.values:  # all is masked, and the encoding of what is left drawn from its posterior
        posterior = teacher.vae.encode(torch.zeros(1, 3, side, side)).latent_dist
        masked = posterior.sample(torch.Generator().manual_seed(0)) * teacher.vae.config.scaling_factor
        blank = blank | Conditioning({"mask": torch.ones(1, 1, *noise.shape[2:]), "masked": masked})
    prompts = [blank.with_prompt(teacher.encode_prompts([text])) for text in (prompt, "")]
    z = noise
    for t in scheduler.timesteps:
        with torch.no_grad():
            c, n = (teacher.call(teacher.network, z, t[None], prompt.values, None) for prompt in prompts)
        z = scheduler.step(n + scale * (c - n), t, z).prev_sample
    return z


# Flux has no classifier-free guidance: test_flux compares it.
@pytest.mark.parametrize("family", [name for name in FAMILY_BUILDERS if name != "flux"])
def test_the_network_is_called_like_the_pipeline_calls_it(family: str, folders: dict[str, Path]) -> None:
    teacher = load_teacher(str(folders[family]))
    channels = teacher.vae.config.latent_channels
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = teacher.generate_latents(["a cat"], noise, steps=3, guidance_scale=3.0, scheduler="DDIMScheduler")
    torch.testing.assert_close(guided_by_hand(teacher, "a cat", noise, 3, 3.0), drawn, rtol=1e-4, atol=1e-4)
    unguided = teacher.generate_latents(["a cat"], noise, steps=3, guidance_scale=1.0, scheduler="DDIMScheduler")
    assert (unguided - drawn).abs().max() > 1e-2


def test_a_t5_that_lacks_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its embeddings have two names, of which a file has one: none of them is missing."""
    shutil.copytree(folders["pixart"], tmp_path / "m")
    (file,) = (tmp_path / "m" / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"text_encoder lacks 1 weights .* encoder.block.0"):
        load_teacher(str(tmp_path / "m"))


def loss_and_gradient(teacher: Teacher, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's loss on fixed latents, and its gradient, with networks that are made of a teacher as in training."""
    config = StudentConfig(kind=kind, rank=2) if kind == "lora" else StudentConfig()  # pyright: ignore[reportArgumentType]
    student = make_student(teacher, config, dtype=torch.float32, seed=0, checkpointing=False)
    networks = [
        x0_eps_network(raw_network(module), teacher.schedule, teacher.prediction_type)
        for module in (student.teacher, student.online, student.target)
    ]
    frozen, online, target = networks
    models = Networks(teacher.schedule, TeacherNetwork(frozen, teacher.encode_prompts([""])), online, target)
    z, _, c = teacher.example(4, 16, "cpu")
    rng = Rng(0, 0, range(4))
    latents = rng.normal("latents", z.shape[1:])
    batch = Batch(latents, c.with_prompt(teacher.encode_prompts(["a cat"])))
    loss = models.loss(LatentConsistency(times="all"), batch, rng)
    loss.mean().backward()
    gradients = [value.grad for _, value in sorted(student.trainable.items())]
    return loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_v_teacher_s_u_net_trains_like_the_epsilon_one_it_was_converted_from(
    kind: str, folders: dict[str, Path]
) -> None:
    losses, gradients = [], []
    for prediction_type in ("epsilon", "v_prediction"):
        teacher = load_teacher(str(folders["sd1"]))

        def as_v(unet: Any, z: torch.Tensor, t: torch.Tensor, c: Any, w: Any, of: Teacher = teacher) -> torch.Tensor:
            """v = alpha eps - sigma x0 of an epsilon network, (eps - sigma z) / alpha."""
            alpha, sigma = of.schedule.alpha(t).double(), of.schedule.sigma(t).double()
            return ((of.call(unet, z, t, c, w).double() - sigma * z) / alpha).float()

        call = as_v if prediction_type == "v_prediction" else teacher.call
        loss, gradient = loss_and_gradient(replace(teacher, prediction_type=prediction_type, call=call), kind)
        losses.append(loss)
        gradients.append(gradient)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_masks_are_rectangles_or_all_and_belong_to_their_seed() -> None:
    masks = [draw_mask(24, 40, seed) for seed in range(300)]
    assert torch.equal(draw_mask(24, 40, 7), masks[7])
    everything = sum(bool(mask.all()) for mask in masks)
    assert 45 < everything < 110  # a quarter of 300, within four standard errors
    for mask in masks:
        rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
        height, width = len(rows), len(columns)
        assert mask.sum() == height * width == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert (height >= 3, width >= 5) == (True, True)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 180


def test_the_network_is_shown_what_the_pipeline_would_show_it(folders: dict[str, Path]) -> None:
    teacher = load_teacher(str(folders["inpainting"]))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encode = lambda images: teacher.encode_images(images)[0]  # noqa: E731
    seeds = [next(s for s in range(99) if bool(draw_mask(16, 16, s).all()) is whole) for whole in (True, False)]
    condition = teacher.condition(SampleInfo(torch.zeros(2, 6), lambda: pixels, encode, seeds))
    masks = torch.stack([draw_mask(16, 16, seed) for seed in seeds])
    pipeline, generators = teacher.pipeline, [torch.Generator() for _ in seeds]
    theirs = pipeline.mask_processor.preprocess(masks, height=16, width=16)
    small, _ = pipeline.prepare_mask_latents(
        theirs, pixels * (theirs < 0.5), 2, 16, 16, torch.float32, "cpu", generators, False
    )
    assert torch.equal(condition["mask"].float(), small)
    torch.testing.assert_close(condition["masked"].float(), encode(pixels * (theirs < 0.5)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("source", ["images", "teacher"])
def test_each_sample_has_a_mask_of_its_own(
    source: str, folders: dict[str, Path], image_folder: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(folders["inpainting"]))
    spec = str(image_folder) if source == "images" else "teacher"
    config = DataConfig(
        sources=(spec,), resolution=16, max_samples=4, teacher_steps=2, cache_dir=str(tmp_path / "cache")
    )
    folder = prepared(spec, config, teacher, 0)
    mean, _, cond, _ = LatentDataset([folder], [4]).read([0, 1, 2, 3])
    assert cond["mask"].shape == (4, 1, 8, 8)
    assert len({tuple(mask.flatten().tolist()) for mask in cond["mask"]}) > 1
    hidden = cond["mask"].bool().expand_as(mean)
    # The latents of what is shown are those of the image where nothing near is hidden; of a whole mask they are one gray.
    blank = teacher.encode_images(torch.zeros(1, 3, 16, 16))[0]
    for i in range(4):
        if hidden[i].all():
            torch.testing.assert_close(cond["masked"][i], blank[0], atol=1e-2, rtol=1e-2)
        else:
            assert (cond["masked"][i] - mean[i]).abs()[hidden[i]].max() > 0
    other = prepared(spec, config, teacher, 1)
    assert other != folder
    assert not torch.equal(LatentDataset([other], [4]).read([0, 1, 2, 3])[2]["mask"], cond["mask"])


@pytest.mark.parametrize("zeros", [True, False])
def test_the_null_prompt_follows_the_pipeline_s_own_rule(zeros: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    index = "model_index.json"
    folder = edited(folders["sdxl"], tmp_path / "m", index, lambda i: {**i, "force_zeros_for_empty_prompt": zeros})
    teacher = load_teacher(str(folder))
    _, embeds, _, pooled = teacher.pipeline.encode_prompt("a cat", None, "cpu", 1, True)
    null, cat = (
        {name: value[:1] for name, value in teacher.encode_prompts(prompts).values.items()}
        for prompts in (["", "a cat"], ["a cat", ""])
    )
    torch.testing.assert_close((null["prompt_embeds"], null["pooled"]), (embeds, pooled))
    assert bool(null["pooled"].any()) is not zeros
    expected = teacher.pipeline.encode_prompt("a cat", None, "cpu", 1, False)
    torch.testing.assert_close((cat["prompt_embeds"], cat["pooled"]), (expected[0], expected[2]))


def test_each_sample_keeps_its_own_sizes(folders: dict[str, Path], tmp_path: Path) -> None:
    """Two images of one caption: the prompt is kept once, the sizes by image, and another prompt leaves them alone."""
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(64, 40), (4000, 5000)]):
        Image.new("RGB", size, (40 * i, 9, 80)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a cat")
    teacher = load_teacher(str(folders["sdxl"]))
    config = DataConfig(sources=(str(images),), resolution=32, cache_dir=str(tmp_path / "cache"))
    dataset = LatentDataset([prepared(str(images), config, teacher, 0)], [None])
    sizes = {tuple(dataset.read([i])[2]["time_ids"][0].tolist()) for i in (0, 1)}
    assert sizes == {(40, 64, 0, 10, 32, 32), (5000, 4000, 4, 0, 32, 32)}
    cond = dataset.read([0, 1])[2]
    assert {name: value.dtype for name, value in cond.values.items()} == dict.fromkeys(cond.values, torch.float32)
    null = teacher.encode_prompts([""])
    dropped = cond.replace_where(torch.tensor([True, False]), null)
    assert torch.equal(dropped["time_ids"], cond["time_ids"])
    assert not dropped["pooled"][0].any()
    assert torch.equal(dropped["pooled"][1], cond["pooled"][1])


def test_what_the_teacher_generates_is_complete(folders: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    teacher = load_teacher(str(folders["sdxl"]))
    own = {"prompts": str(prompts), "resolution": 32, "teacher_steps": 2, "cache_dir": str(tmp_path / "cache")}
    dataset = LatentDataset([prepared("teacher", DataConfig(**own), teacher, 0)], [None])
    assert dataset.read([0, 1])[2]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(80, 40), (40, 80), (40, 40)])
def test_a_frame_says_where_in_the_resized_image_the_crop_lies(size: tuple[int, int], flip: bool) -> None:
    """Resized, mirrored and cropped at the frame's place, the whole image is what the transform makes of it."""

    class Fixed(random.Random):
        def randint(self, a: int, b: int) -> int:
            return b // 4

        def random(self) -> float:
            return 0.0

    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([3 * x, 3 * y, x + y], axis=-1).astype(np.uint8))
    pixels, frame = transform(image, (20, 20), "random", flip, Fixed(0))
    height, width, top, left, *target = (int(v) for v in frame)
    assert ((width, height), target) == (size, [20, 20])
    assert (top, left) == (5 * (size[1] == 80), (15 if flip else 5) * (size[0] == 80))
    whole = image.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)
    whole = ImageOps.mirror(whole) if flip else whole
    cropped = np.asarray(whole.crop((left, top, left + 20, top + 20)), dtype=np.float32)
    assert np.abs(cropped / 127.5 - 1 - pixels.permute(1, 2, 0).numpy()).max() < 0.04


def test_an_inpainting_model_paints_into_an_image(folders: dict[str, Path], tmp_path: Path, command: Command) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "mask.png")
    base = [
        "sample",
        folders["inpainting"],
        "--steps",
        1,
        "--resolution",
        16,
        "--prompt",
        "a cat",
        "--guidance-scale",
        1,
    ]
    drawn = {}
    for name in ("red", "blue", None):
        own = ["--image", f"{name}.png", "--mask", "mask.png"] if name else []
        code, _, error = command(*base, *own, "--output", f"out-{name}")
        assert (code, error) == (0, "")
        drawn[name] = np.asarray(Image.open(newest_image(tmp_path / f"out-{name}")), dtype=float)
    assert len({picture.tobytes() for picture in drawn.values()}) == 3  # it sees the image, and whether there is one
    for words, message in (
        ([*base, "--image", "red.png"], "--image and --mask must be used together"),
        ([*base, "--image", "red.png", "--mask", "none.png"], "cannot be read"),
        (["sample", folders["sd1"], "--image", "red.png", "--mask", "mask.png"], "this is not an inpainting model"),
    ):
        code, _, error = command(*words)
        assert (code, message in error, error.count("\n")) == (2, True, 1)
