"""Draw images with a student, and lay images out as a grid."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lcmdistill.config.methods import METHODS
from lcmdistill.config.recorded import load_run_config, teacher_options
from lcmdistill.sampling.student_pipeline import is_pixel_pipeline, pipeline_kwargs, vp_scheduler
from lcmdistill.students.lora import choose_adapters
from lcmdistill.students.lora_files import load_lora, original_steps_of, scheduler_of
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.teachers.pipelines import is_inpainting, network_of
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import lora_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedImage:
    """One image and what it was drawn with. guidance_scale: diffusers' convention, omega + 1."""

    image: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True)
class ModelToSample:
    """A model to sample from. guidance_scale, resolution and teacher: its run's own, None if it is not a run.

    options: what `load_pipeline` is to be told besides the path: a LoRA's teacher may have a revision or a variant, and
    clip_skip and the VAE's arithmetic are the run's.
    """

    path: str
    guidance_scale: float | None = None
    resolution: int | None = None
    teacher: str | None = None
    loras: tuple[str, ...] = ()
    scheduler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def find_model(model: str | None) -> ModelToSample:
    """A run folder, a pipeline folder or a hub id; None is the newest finished run under runs/.

    Raises UsageError if there is none, or a run has no pipeline yet.
    """
    if model is None:
        made = [*Path("runs").glob("*/pipeline/model_index.json"), *Path("runs").glob("*/lora/*.safetensors")]
        if not made:
            raise UsageError("there is no finished run under runs/; name a MODEL, or train one: lcmdistill distill")
        model = str(max(made, key=lambda path: path.stat().st_mtime).parent.parent)
    run = Path(model).expanduser()
    config = load_run_config(run)
    if not config:
        return ModelToSample(model)
    guidance, side = config.get("run.validation_guidance_scale"), config.get("data.resolution")
    if config.get("student.kind") == "lora":
        lora = str(lora_file(run))
        options = teacher_options(config)
        teacher = options.pop("model")
        scheduler = METHODS[config["objective.name"]].scheduler
        return ModelToSample(teacher, guidance, side, teacher, (lora,), scheduler, options)
    if not (run / "pipeline" / "model_index.json").is_file():
        raise UsageError(f"the run {run} has no pipeline/ yet; run its distill command again to finish it")
    options = {k: v for k, v in teacher_options(config).items() if k in ("vae_dtype", "vae_tiling", "clip_skip")}
    return ModelToSample(str(run / "pipeline"), guidance, side, config["teacher.model"], options=options)


def load_student(
    model: str,
    device: torch.device,
    loras: Sequence[str] = (),
    scales: Sequence[float] = (),
    options: Mapping[str, Any] | None = None,
    scheduler: str | None = None,
) -> Any:
    """A pipeline on its device, with LoRAs on it: half precision on CUDA, fp32 elsewhere.

    loras: kohya or diffusers files, or diffusers or peft folders; with any, the pipeline gets the scheduler, by default the
    `scheduler_for_loras`. scales: their weights, 1 where there are fewer; options, scheduler: as in ModelToSample. Raises
    UsageError on a file that is not a LoRA for this model.
    """
    pipeline = load_pipeline(model, **(options or {}))
    pipeline.set_progress_bar_config(disable=True)
    if loras:
        own = type(pipeline.scheduler).__name__
        scheduler = scheduler or scheduler_for_loras(loras, own)
        grids = [count for lora in loras if (count := original_steps_of(lora)) is not None]
        pipeline.scheduler = vp_scheduler(pipeline.scheduler.config, scheduler, grids[0] if grids else None)
        names = [f"lora_{i}" for i in range(len(loras))]
        for name, lora in zip(names, loras, strict=True):
            load_lora(pipeline, lora, name)
        weights = [*scales, *[1.0] * (len(loras) - len(scales))]
        if hasattr(pipeline, "set_adapters"):
            pipeline.set_adapters(names, weights)
        else:
            choose_adapters(network_of(pipeline), names, weights)
    pipeline.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    if "vae" in pipeline.components:
        pipeline.vae.float()  # it computes in what it was told, and fp32 else: that of SDXL overflows in fp16
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and type(part).__name__.startswith("T5"):
            for name, module in part.named_modules():
                if name.endswith(".wo"):  # where T5 overflows in half precision, as its own loader knows
                    module.float()
    return pipeline


def scheduler_for_loras(loras: Sequence[str], own: str) -> str:
    """The scheduler to draw with: what the first LoRA that names one names, which others may contradict and are told of; else
    the model's own if it is a student's; else LCMScheduler."""
    named = [(lora, name) for lora in loras if (name := scheduler_of(lora)) is not None]
    if not named:
        return own if own in ("LCMScheduler", "TCDScheduler") else "LCMScheduler"
    (first, chosen), *others = named
    for lora, name in others:
        if name != chosen:
            logger.info(
                f"{lora} is for a {name}, and {first} for a {chosen}: drawn with {chosen}, as the first one asks"
            )
    return chosen


def read_image_and_mask(image: Path | None, mask: Path | None) -> tuple[Image.Image, Image.Image] | None:
    """The files of --image and --mask, None without either. Raises UsageError if one is missing or cannot be read."""
    if image is None and mask is None:
        return None
    if image is None or mask is None:
        raise UsageError("--image and --mask go together: what is painted into, and where (white)")
    try:
        return Image.open(image).convert("RGB"), Image.open(mask).convert("L")
    except OSError as error:
        raise UsageError(f"--image {image} or --mask {mask} cannot be read: {error}") from error


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    resolution: int | None = None,
    shown: tuple[Image.Image, Image.Image] | None = None,
    eta: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 4,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[GeneratedImage]:
    """One image for each (prompt, seed). Every image has a generator of its own, so it does not depend on the batch.

    shown: image and mask for an inpainting model, which else draws from the prompt alone; eta: gamma of a TCDScheduler, None
    is ETA. Raises UsageError on more steps than the scheduler has, a resolution that diffusers does not draw, an image for a
    model that takes none, and an eta or a negative prompt that would have no effect.
    """
    _check_effects(pipeline, guidance_scale, eta, negative_prompt)
    check_steps(pipeline, steps)
    if shown and not is_inpainting(pipeline):
        raise UsageError("--image and --mask are for inpainting models, which this is not; leave them out")
    multiple = 8 * network_of(pipeline).config.get("patch_size", 1)
    if resolution is not None and resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise UsageError(f"--resolution is {resolution}; it must be a multiple of {multiple}: try {near}")
    drawings: list[GeneratedImage] = []
    for i in range(0, len(prompts), batch_size):
        some, theirs = list(prompts[i : i + batch_size]), list(seeds[i : i + batch_size])
        told = pipeline_kwargs(
            pipeline,
            some,
            guidance_scale=guidance_scale,
            resolution=resolution,
            shown=shown,
            negative_prompt=negative_prompt,
        )
        told |= {} if eta is None else {"eta": eta}
        generators = [torch.Generator().manual_seed(seed) for seed in theirs]
        images = pipeline(**told, num_inference_steps=steps, generator=generators).images
        drawings += [GeneratedImage(*each) for each in zip(images, some, theirs, strict=True)]
        on_progress(len(drawings))
    return drawings


def check_steps(pipeline: Any, steps: int) -> None:
    """Raise UsageError for more steps than a pipeline's scheduler has."""
    known = pipeline.scheduler.config
    most = known.get("original_inference_steps", known.get("num_train_timesteps", steps))
    if steps > most:
        raise UsageError(
            f"--steps is {steps}; this model's scheduler has {most}, and 1 to 8 are what it was trained for"
        )


def _check_effects(pipeline: Any, guidance_scale: float, eta: float | None, negative_prompt: str | None) -> None:
    if eta is not None and type(pipeline.scheduler).__name__ != "TCDScheduler":
        raise UsageError(
            f"--eta is for a TCDScheduler, and this model has {type(pipeline.scheduler).__name__}; leave it out"
        )
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise UsageError(f"--eta is {eta}; it must be from 0, no fresh noise, to 1")
    if is_pixel_pipeline(pipeline) and (negative_prompt is not None or guidance_scale != 1.0):
        option = "--guidance-scale" if negative_prompt is None else "--negative-prompt"
        raise UsageError(
            f"{option} has no effect on a consistency model in pixel space, which has no guidance; leave it out"
        )
    if negative_prompt is None:
        return
    if has_omega_input(network_of(pipeline)):
        raise UsageError(
            "--negative-prompt has no effect on this student, whose guidance is an input of the network; train one with "
            "--guidance free to keep it"
        )
    if guidance_scale <= 1:
        raise UsageError(
            f"--negative-prompt has no effect at guidance scale {guidance_scale:g}; give a --guidance-scale above 1"
        )


def write_images(
    drawings: Sequence[GeneratedImage],
    folder: Path,
    *,
    model: str,
    steps: int,
    guidance_scale: float,
    sampler: str,
    loras: Sequence[tuple[str, float]] = (),
) -> Path:
    """PNGs with the prompt and settings in their metadata, and grid.png. Returns the grid's path.

    sampler: `sampler_of` the pipeline; loras: files or folders with their weights.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--output {folder} is a file; name a folder") from error
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be made ({error.strerror}); name another folder") from error
    adapters = ", ".join(f"{lora}: {weight:g}" for lora, weight in loras)
    for i, drawing in enumerate(drawings):
        info = PngInfo()
        # The line that A1111 and its kin read from an image's "parameters".
        own = {"prompt": drawing.prompt, "steps": steps, "sampler": sampler, "guidance_scale": f"{guidance_scale:g}"}
        own |= {"seed": drawing.seed, "model": model, **({"loras": adapters} if adapters else {})}
        settings = (
            f"Steps: {steps}, Sampler: {sampler}, CFG scale: {guidance_scale:g}, Seed: {drawing.seed}, "
            f"Size: {drawing.image.width}x{drawing.image.height}, Model: {model}"
            + (f', Loras: "{adapters}"' if adapters else "")
        )
        info.add_itxt("parameters", f"{drawing.prompt}\n{settings}")
        for key, value in own.items():
            info.add_itxt(key, str(value))
        drawing.image.save(folder / f"{i:03d}-{_slug(drawing.prompt)}.png", pnginfo=info)
    columns = math.ceil(math.sqrt(len(drawings)))
    rows = [drawings[i : i + columns] for i in range(0, len(drawings), columns)]
    path = folder / "grid.png"
    grid([[d.image for d in row] for row in rows]).save(path)
    return path


def sampler_of(pipeline: Any) -> str:
    """The name of the scheduler that a pipeline draws with: "LCM", "DDIM"."""
    return type(pipeline.scheduler).__name__.removesuffix("Scheduler")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """Images in rows, on white. columns: a heading for each column; labels: one for each row, set above it.

    cell: side of a cell in pixels; by default the images' own, small ones doubled until they can be looked at.
    """
    side = cell or rows[0][0].width
    while cell is None and side < 96:
        side *= 2
    gap, size = max(4, side // 24), max(11, side // 9)
    font, line = ImageFont.load_default(size=size), round(size * 1.5)
    head, above = (line * (1 + max(c.count("\n") for c in columns)) if columns else 0), line if labels else 0
    width = max(len(row) for row in rows) * (side + gap) + gap
    canvas = Image.new("RGB", (width, head + len(rows) * (side + gap + above) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for j, text in enumerate(columns):
        pen.multiline_text((gap + j * (side + gap) + side / 2, head / 2), text, "black", font, "mm", align="center")
    for i, row in enumerate(rows):
        top = head + gap + i * (side + gap + above)
        if labels:
            pen.text((gap, top + above / 2), labels[i], "#555555", font, "lm")
        for j, image in enumerate(row):
            resample = Image.Resampling.NEAREST if side % image.width == 0 else Image.Resampling.LANCZOS
            canvas.paste(image.resize((side, side), resample), (gap + j * (side + gap), top + above))
    return canvas
