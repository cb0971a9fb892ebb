"""A student as a complete diffusers pipeline."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from lcmdistill.diffusion.schedules import SIGMA_DATA, KarrasSchedule
from lcmdistill.teachers.base import Teacher, has_omega_input
from lcmdistill.teachers.pipelines import extra_call_kwargs, native_size
from lcmdistill.teachers.pixel import class_labels
from lcmdistill.teachers.prompts import prompt_kwargs
from lcmdistill.utils.errors import UsageError

STEPS = 4
"the number of sampling steps that a model card recommends"

ORIGINAL_STEPS = 50
"diffusers' default of `original_inference_steps`: T / k for T = 1000 and k = 20"


def trained_steps(num_steps: int, objective: Mapping[str, Any]) -> int:
    """Return how many of the teacher's T time steps a student samples from: diffusers' `original_inference_steps`.

    The schedulers of few-step students place this many time steps T / n apart, the last at T - 1, and sample at a
    choice of them. A student that was trained on the grid of every k-th step must sample there and nowhere else.

    Args:
        num_steps: T, the number of the teacher's time steps.
        objective: The objective's settings; methods without `skip` keep diffusers' default.
    """
    skip = objective.get("skip")
    if skip is None or num_steps <= skip:
        return min(ORIGINAL_STEPS, num_steps)
    if objective.get("times", "grid") == "grid":
        return num_steps // skip
    # Trained at every time step from k to T - 1: the default grid, unless its sampled steps could lie below k.
    least = num_steps // ORIGINAL_STEPS
    if skip <= least:
        return min(ORIGINAL_STEPS, num_steps)
    return next(num_steps // gap for gap in range(skip + 1, num_steps + 1) if num_steps % gap == 0)


def vp_scheduler(config: Mapping[str, Any], name: str, original_steps: int | None = None) -> Any:
    """Return a student's scheduler, LCMScheduler or TCDScheduler, with the teacher's betas and prediction type.

    Args:
        config: The teacher's scheduler config.
        name: The scheduler's class.
        original_steps: The result of `trained_steps`; None keeps diffusers' default.
    """
    import diffusers

    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    values = {key: config[key] for key in (*kept, "rescale_betas_zero_snr") if key in config}
    if original_steps is not None:
        values["original_inference_steps"] = original_steps
    return getattr(diffusers, name)(**values, steps_offset=1, set_alpha_to_one=False, clip_sample=False)


def student_scheduler(teacher: Teacher, name: str, objective: Mapping[str, Any]) -> Any:
    """Return a student's scheduler: the named one for a VP teacher, that of Consistency Models for Karras' schedule.

    Args:
        teacher: The teacher, whose betas and prediction type the student keeps.
        name: The scheduler's class for a VP teacher.
        objective: The objective's settings, for `trained_steps`.
    """
    from diffusers import CMStochasticIterativeScheduler

    schedule = teacher.schedule
    if not isinstance(schedule, KarrasSchedule):
        return vp_scheduler(teacher.pipeline.scheduler.config, name, trained_steps(schedule.num_steps, objective))
    return CMStochasticIterativeScheduler(
        num_train_timesteps=schedule.num_steps,
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        sigma_data=SIGMA_DATA,
        rho=schedule.rho,
    )


def is_pixel_pipeline(pipeline: Any) -> bool:
    """Whether a student's pipeline draws pixels, by the names of classes or by nothing at all."""
    return type(pipeline).__name__ == "ConsistencyModelPipeline"


def pipeline_kwargs(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float | None,
    resolution: int | None,
    shown: tuple[Any, Any] | None = None,
    negative_prompt: str | None = None,
) -> dict[str, Any]:
    """What a student's pipeline is called with, besides its steps and its noise, to draw an image a prompt.

    shown: image and mask, as in `extra_call_kwargs`. Raises UsageError for what a pipeline in pixel space
    cannot generate: a prompt that is not a class, or another size.
    """
    if not is_pixel_pipeline(pipeline):
        height, width = (resolution, resolution) if resolution else native_size(pipeline)
        told = {"guidance_scale": guidance_scale, "height": height, "width": width}
        told |= prompt_kwargs(pipeline, prompts, negative_prompt)
        return told | extra_call_kwargs(pipeline, len(prompts), height, width, shown)
    own = pipeline.unet.config.sample_size
    if resolution not in (None, own):
        raise UsageError(f"--resolution is {resolution}; this model draws at {own} and nothing else")
    return {"batch_size": len(prompts), "class_labels": class_labels(pipeline.unet, prompts)}


def student_pipeline(
    teacher: Teacher,
    network: Any,
    resolution: int | None = None,
    *,
    scheduler: str = "LCMScheduler",
    objective: Mapping[str, Any] | None = None,
) -> Any:
    """The student with everything around it, on its `student_scheduler`, in the class of the teacher's pipeline.

    A LatentConsistencyModelPipeline if the U-Net of a StableDiffusionPipeline takes omega; that class can run no other, and
    passes no eta on to a TCDScheduler. A ConsistencyModelPipeline in pixel space. A student with its guidance in its weights
    is to be used at guidance scale 1. The teacher's safety checker goes along where it ships one, as its licence asks.
    resolution: what the pipeline is to draw at unless told otherwise; by default the teacher's own. objective: its settings,
    which decide the time steps that are sampled.
    """
    from diffusers import ConsistencyModelPipeline, LatentConsistencyModelPipeline, StableDiffusionPipeline

    if resolution is not None and teacher.network_name == "unet":  # to a transformer the size means more than a default
        network.register_to_config(sample_size=resolution // teacher.vae_factor)
    kind, source = type(teacher.pipeline), teacher.pipeline
    if kind is StableDiffusionPipeline and has_omega_input(network) and scheduler == "LCMScheduler":
        kind = LatentConsistencyModelPipeline
    if teacher.in_pixels:
        kind = ConsistencyModelPipeline
    # Its parts, and those of its options that are no parts, such as SDXL's rule for the empty prompt.
    options = {**source.config, **source.components, teacher.network_name: network}
    options |= {"scheduler": student_scheduler(teacher, scheduler, objective or {})}
    options |= {"requires_safety_checker": options.get("safety_checker") is not None}
    pipeline = kind(**{name: options[name] for name in signature(kind.__init__).parameters if name in options})
    pipeline.set_progress_bar_config(disable=True)
    if "_clip_skip" in source.config:
        pipeline.register_to_config(_clip_skip=source.config["_clip_skip"])
    return pipeline
