"""Other ways to sample a model: from an image instead of noise, with another scheduler, and with more or less fresh noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from PIL import Image, ImageOps

from lcmdistill.objectives import OBJECTIVES, method_sampled_by
from lcmdistill.sampling.student_pipeline import Size, height_and_width
from lcmdistill.teachers.pipelines import native_size, size_multiple
from lcmdistill.teachers.registry import family_of
from lcmdistill.teachers.schedulers import COPIED, FLOW_SAMPLER, is_flow, student_scheduler
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.units import counted

SCHEDULERS = {
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"value of --scheduler -> diffusers class"

FLOW_SCHEDULERS = {"lcm": "FlowMatchLCMScheduler", "euler": FLOW_SAMPLER}
"the same for flow-matching models"


def use_scheduler(pipeline: Any, name: str) -> tuple[Any, str | None]:
    """Return a pipeline with another scheduler on the same betas.

    Args:
        pipeline: The pipeline.
        name: A key of SCHEDULERS.

    Returns:
        The pipeline, and a sentence if the model was made for another scheduler, otherwise None.

    Raises:
        UsageError: A model in pixel space has a sampler of its own, and a flow-matching model has two.
    """
    if family_of(pipeline).in_pixels:
        raise UsageError("--scheduler is for latent models, and this one works on pixels; remove this option")
    import diffusers

    flow = is_flow(pipeline.scheduler.config)
    if flow and name not in FLOW_SCHEDULERS:
        raise UsageError(
            f"--scheduler {name} is not for flow-matching models, such as this one; use {' or '.join(FLOW_SCHEDULERS)}"
        )
    before, wanted = type(pipeline.scheduler).__name__, (FLOW_SCHEDULERS if flow else SCHEDULERS)[name]
    if before == wanted:
        return pipeline, None
    plain = getattr(diffusers, family_of(pipeline).pipeline_classes[0])
    if not isinstance(pipeline, plain):  # a pipeline of LCMs calls no other scheduler
        options = {
            **pipeline.components,
            "requires_safety_checker": pipeline.config.get("requires_safety_checker", False),
        }
        clip_skip = pipeline.config.get("_clip_skip")
        pipeline = plain(**{key: options[key] for key in signature(plain.__init__).parameters if key in options})
        pipeline.set_progress_bar_config(disable=True)
        if clip_skip:
            pipeline.register_to_config(_clip_skip=clip_skip)
    config = pipeline.scheduler.config
    if flow or method_sampled_by(wanted) is not None:
        pipeline.scheduler = student_scheduler(config, wanted, {})
    else:  # students start at the last time, which only this spacing takes
        betas = {key: config[key] for key in COPIED if key in config}
        pipeline.scheduler = getattr(diffusers, wanted).from_config(betas, timestep_spacing="trailing", steps_offset=1)
    made_for = before.removesuffix("Scheduler")
    return pipeline, f"this model is made for the {made_for} sampler; with {name} it may give poor images"


@dataclass(frozen=True)
class StartImage:
    """An image to start from, in the size of the result; the pipeline that does so, and how much noise is added, 0 to 1."""

    pipeline: Any
    image: Image.Image
    strength: float

    def replace(self, kwargs: Mapping[str, Any], count: int) -> tuple[Any, dict[str, Any]]:
        """Return the pipeline to call, and its arguments from those of the text-to-image pipeline."""
        own = {key: value for key, value in kwargs.items() if key not in ("height", "width")}
        taken = signature(self.pipeline.__call__).parameters
        # Pipelines of transformers have a size of their own, and would not take the image's.
        size = {"height": self.image.height, "width": self.image.width}
        own |= {key: value for key, value in size.items() if key in taken}
        return self.pipeline, {**own, "image": [self.image] * count, "strength": self.strength}


def start_image(
    pipeline: Any, image: Image.Image, strength: float, steps: int, size: Size | None, usual: Size | None = None
) -> StartImage:
    """Return an image to start from, in the size that is generated.

    Args:
        pipeline: A text-to-image pipeline.
        image: The image to start from.
        strength: How much noise is added: near 0 keeps the image, 1 only its colors.
        steps: The number of sampling steps, of which the share `strength` is taken.
        size: The size of the result; None keeps the image's shape at the area of `usual`.
        usual: The size that the model was trained for; None is its native size.

    Raises:
        UsageError: The family has no such pipeline, or no step is left to take.
    """
    if family_of(pipeline).takes_mask:
        raise UsageError(
            "--image and --mask must be used together with an inpainting model: the image, and the area to repaint (white)"
        )
    if int(steps * strength) < 1:
        least = math.ceil(1 / strength)
        raise UsageError(
            f"--strength {strength:g} of {counted(steps, 'step')} leaves none to take; raise --steps to at least {least}, or "
            "raise --strength"
        )
    if is_flow(pipeline.scheduler.config) and family_of(pipeline).network == "unet":
        raise UsageError("--image is not supported for a U-Net of flow matching; remove --image")
    from diffusers import AutoPipelineForImage2Image

    try:
        start = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise UsageError(
            f"--image is for Stable Diffusion 1, 2, 3 and XL and for FLUX.1, and this is a {type(pipeline).__name__}; remove "
            "--image"
        ) from error
    start.set_progress_bar_config(disable=True)
    if size is None:
        height, width = native_size(pipeline) if usual is None else height_and_width(usual)
        scale, multiple = (height * width / (image.height * image.width)) ** 0.5, size_multiple(pipeline)
        rounded = (max(multiple, multiple * round(scale * side / multiple)) for side in (image.height, image.width))
        size = next(rounded), next(rounded)
    height, width = height_and_width(size)
    return StartImage(start, ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS), strength)


def check_eta(pipeline: Any, eta: float | None) -> None:
    """Raise UsageError for an eta that is out of range, or that the pipeline's scheduler does not take."""
    scheduler = type(pipeline.scheduler).__name__
    method = method_sampled_by(scheduler)
    if eta is not None and (method is None or "eta" not in method.sampling_options):
        known = sorted({each.info.scheduler for each in OBJECTIVES.values() if "eta" in each.info.sampling_options})
        raise UsageError(f"--eta is for a {', '.join(known)}, and this model has {scheduler}; remove this option")
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise UsageError(f"--eta is {eta}; it must be from 0 (no fresh noise) to 1")
