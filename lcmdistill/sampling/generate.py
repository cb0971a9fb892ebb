"""Find a model, load it for sampling, and generate images with it."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lcmdistill.config.guidance import OmegaRange, omega_range
from lcmdistill.data.images import ImageError, open_image
from lcmdistill.objectives import method_sampled_by
from lcmdistill.objectives.recorded import load_run_config
from lcmdistill.sampling.png import GeneratedImage
from lcmdistill.sampling.student_pipeline import Size, check_size, pipeline_kwargs
from lcmdistill.sampling.variations import StartImage, check_eta
from lcmdistill.students.lora_files import run_takes_guidance, scheduler_of, scheduler_options_of
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.folders import only_variant
from lcmdistill.teachers.loading import load_pipeline, nonfinite_part
from lcmdistill.teachers.lora.adapters import choose_adapters
from lcmdistill.teachers.lora.files import load_lora
from lcmdistill.teachers.naming import resolve_alias
from lcmdistill.teachers.pipelines import call_pipeline, network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.teachers.schedulers import student_scheduler
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.run_dir import lora_file

logger = logging.getLogger(__name__)

DEFAULT_SCHEDULER = "LCMScheduler"
"for LoRAs that record no scheduler, on a model whose own is not a student's"


@dataclass(frozen=True)
class ModelToSample:
    """A model to sample from. What only a run records is None for other models.

    Attributes:
        path: A pipeline folder, a single file or a hub id; for a LoRA run, the teacher.
        guidance_scale: The guidance scale that the run recommends.
        resolution: The run's training resolution.
        teacher: The run's teacher.
        loras: LoRA files to load.
        scheduler: The diffusers class that samples the LoRAs.
        options: Further arguments of `load_pipeline`, such as a revision, clip_skip or the VAE's precision.
        precision: The run's precision setting.
        omegas: The omegas that the run was trained with.
        is_baked: Whether the guidance is in the student's weights.
        steps: The number of sampling steps that the run's method recommends.
        folder: The run folder.
    """

    path: str
    guidance_scale: float | None = None
    resolution: int | None = None
    teacher: str | None = None
    loras: tuple[str, ...] = ()
    scheduler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    omegas: OmegaRange | None = None
    is_baked: bool = False
    steps: int = 4
    folder: Path | None = None


def find_model(model: str | None) -> ModelToSample:
    """Resolve a run folder, a pipeline folder or a hub id. None is the newest finished run under runs/.

    Raises:
        UsageError: There is no finished run, or the run has no pipeline yet.
    """
    if model is None:
        finished = [*Path("runs").glob("*/pipeline/model_index.json"), *Path("runs").glob("*/lora/*.safetensors")]
        if not finished:
            raise UsageError("there is no finished run under runs/; specify MODEL, or train one: lcmdistill distill")
        model = str(max(finished, key=lambda path: path.stat().st_mtime).parent.parent)
    run = Path(model).expanduser()
    config = load_run_config(run)
    if config is None:
        return ModelToSample(model)
    options = dataclasses.asdict(config.teacher)
    teacher = options.pop("model")
    omegas = omega_range(config)
    recorded: dict[str, Any] = {
        "guidance_scale": config.run.validation_guidance_scale,
        "resolution": config.data.resolution,
        "teacher": teacher,
        "precision": config.run.precision,
        "omegas": omegas,
        "is_baked": omegas is not None and not run_takes_guidance(run),
        "steps": config.objective.info.steps(config.objective).recommended,
        "folder": run,
    }
    if config.student.kind == "lora":
        scheduler = config.objective.info.scheduler
        if config.student.lora_relative_to == "base":  # the file contains the teacher's LoRAs
            options |= {"loras": None, "lora_checksums": None}
        return ModelToSample(teacher, loras=(str(lora_file(run)),), scheduler=scheduler, options=options, **recorded)
    if not (run / "pipeline" / "model_index.json").is_file():
        raise UsageError(f"the run {run} has no pipeline/ yet; run its distill command again to finish it")
    options = {key: options[key] for key in ("vae_dtype", "vae_tiling", "clip_skip")}
    return ModelToSample(str(run / "pipeline"), options=options, **recorded)


def sampling_dtype(requested: str | None, recorded: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a pipeline's networks.

    Args:
        requested: The value of --precision, which applies on every device.
        recorded: The run's precision, which applies on CUDA only. Other devices compute in fp32.
        device: The device to sample on.
    """
    if requested is not None:
        return compute_dtype(requested, device)
    return compute_dtype(recorded or "auto", device) if device.type == "cuda" else torch.float32


def load_student(
    model: str,
    device: torch.device,
    loras: Sequence[str] = (),
    scales: Sequence[float] = (),
    options: Mapping[str, Any] | None = None,
    scheduler: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a pipeline and its LoRAs onto a device.

    Args:
        model: A pipeline folder, a single file or a hub id.
        device: The device to load onto.
        loras: Kohya or diffusers files, or diffusers or peft folders. With any LoRA, the scheduler is replaced.
        scales: The LoRAs' weights; missing ones are 1.
        options: Further arguments of `load_pipeline`.
        scheduler: The diffusers class that samples the LoRAs; None is `scheduler_for_loras`.
        dtype: The dtype of all networks except the VAE; None is `sampling_dtype` without a recorded precision.

    Raises:
        UsageError: A file is not a LoRA for this model, or weights contain NaN or Inf.
    """
    dtype = dtype or sampling_dtype(None, None, device)
    options = dict(options or {})
    folder = Path(resolve_alias(model)).expanduser()
    if options.get("variant") is None and (folder / "model_index.json").is_file():
        options["variant"] = only_variant(folder)
    pipeline = load_pipeline(model, **options)
    pipeline.set_progress_bar_config(disable=True)
    if loras:
        current = type(pipeline.scheduler).__name__
        scheduler = scheduler or scheduler_for_loras(loras, current)
        sampled = (scheduler_options_of(lora) for lora in loras if scheduler_of(lora) == scheduler)
        pipeline.scheduler = student_scheduler(pipeline.scheduler.config, scheduler, next(sampled, {}))
        names = [f"lora_{i}" for i in range(len(loras))]
        weights = [*scales, *[1.0] * (len(loras) - len(scales))]
        each = zip(names, loras, weights, strict=True)
        adapters = {name: weight for name, lora, weight in each if load_lora(pipeline, lora, name, weight)}
        if adapters and hasattr(pipeline, "set_adapters"):
            pipeline.set_adapters(list(adapters), list(adapters.values()))
        elif adapters:
            choose_adapters(network_of(pipeline), list(adapters), list(adapters.values()))
    pipeline.to(device, dtype)
    if "vae" in pipeline.components:
        pipeline.vae.float()  # SDXL's VAE overflows in fp16; `vae_dtype` selects what it computes in
    family = family_of(pipeline)
    for part in (pipeline.components.get(name) for name in family.text_encoders):
        for name, module in part.named_modules() if part is not None else ():
            if name.endswith(family.fp32_layers):
                module.float()
    if dtype == torch.float16 or loras:  # `load_pipeline` has checked the rest
        _check_finite(pipeline, model, loras, dtype)
    return pipeline


def _check_finite(pipeline: Any, model: str, loras: Sequence[str], dtype: torch.dtype) -> None:
    """Raise UsageError if a weight became NaN or Inf; such a model generates black images. Files were checked before."""
    if (broken := nonfinite_part(pipeline)) is not None:
        source = f"{model} with {', '.join(loras)}" if loras else model
        raise UsageError(
            f"{source}: the weights of its {broken} contain NaN or Inf in {str(dtype).removeprefix('torch.')}; use "
            "--precision fp32 or bf16"
        )


def scheduler_for_loras(loras: Sequence[str], current: str) -> str:
    """Return the scheduler class to sample LoRAs with.

    It is the class that the first LoRA records; a message reports the LoRAs that record another. Without a record it is
    the model's current class if that is a student's, otherwise DEFAULT_SCHEDULER.
    """
    recorded = [(lora, name) for lora in loras if (name := scheduler_of(lora)) is not None]
    if not recorded:
        return current if method_sampled_by(current) else DEFAULT_SCHEDULER
    (first, chosen), *others = recorded
    for lora, name in others:
        if name != chosen:
            logger.info(
                f"{lora} is for a {name}, and {first} is for a {chosen}: using {chosen}, as the first LoRA records"
            )
    return chosen


def read_image_and_mask(image: Path | None, mask: Path | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Read the files of --image and --mask like training images: upright, 8 bits, on white. None for one that is not given.

    Transparent areas of the mask are not repainted.

    Raises:
        UsageError: There is a mask and no image, or a file cannot be read.
    """
    if image is None and mask is not None:
        raise UsageError("--mask needs --image: the image to edit; the mask is the area to repaint (white)")
    return (
        None if image is None else _read_image("--image", image),
        None if mask is None else _read_image("--mask", mask, background="black").convert("L"),
    )


def _read_image(option: str, path: Path, background: str = "white") -> Image.Image:
    try:
        return open_image(path, background)
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{option} {path} cannot be read: {reason}; pass a PNG, JPEG or WebP file") from error


def image_size(model: ModelToSample, resolution: int | None, width: int | None, height: int | None) -> Size | None:
    """Return the image size that the options ask for; None is the pipeline's native size.

    --resolution N is short for --width N --height N. A missing side is the run's resolution.

    Raises:
        UsageError: The options contradict each other, or a side is missing.
    """
    if width is None and height is None:
        return resolution or model.resolution
    if resolution is not None:
        raise UsageError("--resolution is for squares; pass either --resolution or --width and --height")
    if (width is None or height is None) and model.resolution is None:
        raise UsageError(
            f"{'--height' if width is None else '--width'} needs the other side; pass --width and --height"
        )
    return height or model.resolution or 0, width or model.resolution or 0


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    size: Size | None = None,
    image_and_mask: tuple[Image.Image, Image.Image] | None = None,
    start: StartImage | None = None,
    strength: float | None = None,
    eta: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 4,
    on_images: Callable[[list[GeneratedImage]], None] = lambda images: None,
) -> list[GeneratedImage]:
    """Generate one image per (prompt, seed). Each image has its own generator, so it does not depend on the batch size.

    Args:
        pipeline: The pipeline to sample.
        prompts: One prompt per image.
        seeds: One seed per image.
        steps: The number of sampling steps.
        guidance_scale: The guidance scale in diffusers' convention (omega + 1).
        size: The image size; None is the pipeline's native size.
        image_and_mask: The image and mask for an inpainting model. Without them it generates from the prompt only.
        start: The image to start from instead of noise.
        strength: How much of the masked area may change, 0 to 1; None is all.
        eta: gamma of a TCDScheduler; None is the method's default.
        negative_prompt: The negative prompt for all images.
        batch_size: How many images to generate at once.
        on_images: Called with the images of each batch as soon as they are finished.

    Raises:
        UsageError: The scheduler has fewer steps, the size is not possible, or an option would have no effect.
    """
    _check_effects(pipeline, guidance_scale, eta, negative_prompt)
    check_steps(pipeline, steps)
    if image_and_mask and not family_of(pipeline).takes_mask:
        raise UsageError("this is not an inpainting model; remove --image and --mask")
    if size is not None:
        check_size(pipeline, size)
    images: list[GeneratedImage] = []
    for i in range(0, len(prompts), batch_size):
        batch_prompts, batch_seeds = list(prompts[i : i + batch_size]), list(seeds[i : i + batch_size])
        kwargs = pipeline_kwargs(
            pipeline,
            batch_prompts,
            guidance_scale=guidance_scale,
            size=size,
            image_and_mask=image_and_mask,
            negative_prompt=negative_prompt,
        )
        kwargs |= {key: value for key, value in (("eta", eta), ("strength", strength)) if value is not None}
        generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
        call, kwargs = (pipeline, kwargs) if start is None else start.replace(kwargs, len(batch_prompts))
        outputs = _called(call, kwargs, steps, generators)
        finished = [GeneratedImage(*each) for each in zip(outputs, batch_prompts, batch_seeds, strict=True)]
        images += finished
        on_images(finished)
    return images


def _called(pipeline: Any, kwargs: Mapping[str, Any], steps: int, generators: list[torch.Generator]) -> list[Any]:
    """Return the images of one call of a pipeline, or raise RunError for what the model's files make of it."""
    try:
        with np.errstate(invalid="raise"):  # of NaN that becomes 8 bits
            return call_pipeline(pipeline, kwargs, steps=steps, generator=generators).images
    except FloatingPointError as error:
        raise RunError(
            "the model generates NaN instead of images; use --precision fp32 or bf16, or another checkpoint"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if "memory" in str(error).lower():
            raise
        reason = (str(error).strip() or "no reason").split("\n")[0]
        raise RunError(
            f"the model cannot generate images with these options ({type(error).__name__}: {reason}); its configuration "
            "files may be damaged or of another model"
        ) from error


def default_guidance_scale(pipeline: Any, *, has_loras: bool) -> float:
    """Return the guidance scale for a model without a recommendation of its own.

    It is 1 with a LoRA, whose guidance is usually in its weights, unless the network takes guidance as an input.
    """
    family = family_of(pipeline)
    takes_guidance = family.embeds_guidance or has_omega_input(network_of(pipeline))
    return 1.0 if has_loras and not takes_guidance else family.published.get("data.guidance_scale", 8.5)


def check_steps(pipeline: Any, steps: int) -> None:
    """Raise UsageError for more steps than a pipeline's scheduler has."""
    config = pipeline.scheduler.config
    limit = config.get("original_inference_steps", config.get("num_train_timesteps", steps))
    if steps > limit:
        raise UsageError(f"--steps is {steps}; this model's scheduler has {limit}, and students are trained for 1 to 8")


def guidance_warning(model: ModelToSample, guidance_scale: float) -> str | None:
    """Return a sentence if the student was not trained for a guidance scale; None if it was, or nothing is recorded."""
    if model.omegas is None:
        return None
    if model.is_baked:
        if guidance_scale == 1:
            return None
        effect = "applies CFG on top of it, at twice the cost" if guidance_scale > 1 else "has no effect"
        return (
            f"this student was trained with guidance scale {model.omegas.scale} in its weights; guidance scale "
            f"{guidance_scale:g} {effect}: use 1"
        )
    if model.omegas.low + 1 <= guidance_scale <= model.omegas.high + 1:
        return None
    return (
        f"guidance scale {guidance_scale:g} is outside the range that this student was trained with; expect poor images, "
        f"or use {model.omegas.scale}"
    )


def _check_effects(pipeline: Any, guidance_scale: float, eta: float | None, negative_prompt: str | None) -> None:
    """Raise UsageError for an option that would have no effect."""
    check_eta(pipeline, eta)
    if family_of(pipeline).in_pixels and (negative_prompt is not None or guidance_scale != 1.0):
        option = "--guidance-scale" if negative_prompt is None else "--negative-prompt"
        raise UsageError(
            f"{option} has no effect on a consistency model in pixel space, which has no guidance; remove this option"
        )
    if negative_prompt is None:
        return
    embeds = family_of(pipeline).embeds_guidance
    if embeds or has_omega_input(network_of(pipeline)):
        remedy = "remove this option" if embeds else "train one with --guidance free to use it"
        raise UsageError(
            f"--negative-prompt has no effect on this model, whose guidance is an input of the network; {remedy}"
        )
    if guidance_scale <= 1:
        raise UsageError(
            f"--negative-prompt has no effect at guidance scale {guidance_scale:g}; pass a --guidance-scale above 1"
        )


def sampler_name(pipeline: Any) -> str:
    """Return the short name of a pipeline's scheduler, such as "LCM" or "DDIM"."""
    return type(pipeline.scheduler).__name__.removesuffix("Scheduler")
