"""A student as a complete diffusers pipeline."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

from lcmdistill.objectives.base import Objective
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.teachers.base import Teacher, has_omega_input
from lcmdistill.teachers.pipelines import extra_call_kwargs, native_size, network_of, size_multiple
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.errors import UsageError

Size = int | tuple[int, int]
"an image size in pixels: the side of a square, or (height, width)"


def pipeline_kwargs(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float | None,
    size: Size | None,
    image_and_mask: tuple[Any, Any] | None = None,
    negative_prompt: str | None = None,
) -> dict[str, Any]:
    """Return the arguments of a pipeline call that generates one image per prompt, except steps and noise.

    Args:
        pipeline: A student's or a teacher's pipeline.
        prompts: One prompt per image.
        guidance_scale: The guidance scale in diffusers' convention (omega + 1).
        size: The image size; None is the pipeline's native size.
        image_and_mask: The image and mask for an inpainting pipeline, as in `extra_call_kwargs`.
        negative_prompt: The negative prompt for all images.

    Raises:
        UsageError: A pipeline in pixel space cannot generate this class or this size.
    """
    family = family_of(pipeline)
    kwargs = family.prompt_kwargs(pipeline, prompts, negative_prompt)
    if not family.in_pixels:
        height, width = native_size(pipeline) if size is None else height_and_width(size)
        kwargs |= {"guidance_scale": guidance_scale, "height": height, "width": width}
        return kwargs | extra_call_kwargs(pipeline, len(prompts), height, width, image_and_mask)
    native = pipeline.unet.config.sample_size
    if size is not None and height_and_width(size) != (native, native):
        height, width = height_and_width(size)
        given = f"--resolution is {height}" if height == width else f"the size is {width}x{height}"
        raise UsageError(f"{given}; this model generates only {native}x{native} px")
    return kwargs


def check_size(pipeline: Any, size: Size) -> None:
    """Raise UsageError for a size that a pipeline cannot generate."""
    family = family_of(pipeline)
    if family.in_pixels:
        return  # `pipeline_kwargs` accepts the native size only
    multiple = size_multiple(pipeline)
    most = family.largest_side(network_of(pipeline).config, pipeline.vae_scale_factor)
    sides = {"--resolution": size} if isinstance(size, int) else dict(zip(("--height", "--width"), size, strict=True))
    for option, side in sides.items():
        if side % multiple:
            nearest = max(multiple, round(side / multiple) * multiple)
            raise UsageError(f"{option} is {side}; it must be a multiple of {multiple}: try {nearest}")
        if most is not None and side > most:
            raise UsageError(f"{option} is {side}; this model generates at most {most} px")


def height_and_width(size: Size) -> tuple[int, int]:
    """Return (height, width) of an image size."""
    return (size, size) if isinstance(size, int) else size


def student_pipeline(
    teacher: Teacher,
    network: Any,
    resolution: int | None = None,
    *,
    objective: Objective | None = None,
) -> Any:
    """Return the student as a pipeline with its family's student scheduler.

    Its class is the teacher's, unless the family names one for such students. A student with guidance in its weights must
    be sampled at guidance scale 1. The teacher's safety checker is included if it has one, because its license may require
    it.

    Args:
        teacher: The teacher, which provides all other components.
        network: The student's network.
        resolution: The pipeline's default resolution; None is the teacher's.
        objective: The run's objective, which decides the scheduler and the sampled time steps; None is LCM's.
    """
    import diffusers

    objective = objective if objective is not None else cast(Objective, LatentConsistency())
    family, source, method = teacher.family, teacher.pipeline, teacher.method(objective.info)
    if resolution is not None and family.sample_size_is_default:
        network.register_to_config(sample_size=resolution // teacher.vae_factor)
    # diffusers' LCM pipelines pass options to the scheduler that flow matching has not.
    has_options = bool(method.sampling_options) or teacher.is_flow
    class_name = family.student_pipeline_class(has_omega_input(network), has_options)
    pipeline_class = getattr(diffusers, class_name) if class_name else type(source)
    sampling = method.scheduler_options(objective, teacher.schedule.num_steps)
    # The config holds options that are not components, such as SDXL's rule for the empty prompt.
    options = {**source.config, **source.components, family.network: network}
    options |= {
        "scheduler": family.student_scheduler(teacher.schedule, source.scheduler.config, method.scheduler, sampling)
    }
    options |= {"requires_safety_checker": options.get("safety_checker") is not None}
    accepted = signature(pipeline_class.__init__).parameters
    pipeline = pipeline_class(**{name: options[name] for name in accepted if name in options})
    pipeline.set_progress_bar_config(disable=True)
    if "_clip_skip" in source.config:
        pipeline.register_to_config(_clip_skip=source.config["_clip_skip"])
    return pipeline
