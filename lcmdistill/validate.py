"""The validation grid: fixed prompts, fixed noise, drawn every so many steps with the EMA student."""

from pathlib import Path
from typing import Any

import torch

from lcmdistill.batch import derive_seed
from lcmdistill.data.sources import read_prompts
from lcmdistill.export.pipeline import call_options, is_pixel_pipeline, student_pipeline
from lcmdistill.sample import grid
from lcmdistill.settings import RunConfig
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.drawing import pipeline_latents
from lcmdistill.teachers.pixel import class_names
from lcmdistill.tracking import Metrics

STEPS = (1, 2, 4, 8)
PROMPTS = (
    "portrait of an old fisherman, soft window light",
    "a red bicycle leaning on a white wall",
    "watercolour of a harbour at dawn",
    "a bowl of ramen, top view, food photography",
)
UNTOLD = ("image 1", "image 2", "image 3", "image 4")
"rows of a network that takes no prompt; each has noise of its own"


class Validation:
    """Draws samples/step-N.png: a row a prompt, a column for each of STEPS."""

    def __init__(self, config: RunConfig, teacher: Teacher, folder: Path) -> None:
        self._config, self._teacher, self._folder = config, teacher, folder
        self._prompts = config.run.validation_prompts or default_prompts(config.teacher.model, teacher.network)

    def draw(self, step: int, unet: Any, metrics: Metrics | None) -> Path:
        """Draw the grid of a step. unet: the network to draw with, on its device."""
        teacher, device = self._teacher, unet.device
        side = self._config.data.resolution // teacher.vae_factor
        pipeline = student_pipeline(teacher, unet, self._config.data.resolution)
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        resting = [part for part in parts if part.device != device]
        for part in resting:
            part.to(device)
        shape = (1, teacher.vae.config.latent_channels, side, side)
        images = [self._row(pipeline, prompt, shape) for prompt in self._prompts]
        for part in resting:
            part.to("cpu")
        picture = grid(images, columns=[f"{n} step{'s' * (n > 1)}" for n in STEPS], labels=self._prompts)
        path = self._folder / "samples" / f"step-{step:06d}.png"
        picture.save(path)
        if metrics is not None:
            metrics.image(step, "validation", picture)
        return path

    def _row(self, pipeline: Any, prompt: str, shape: tuple[int, ...]) -> list[Any]:
        run, row = self._config.run, []
        for steps in STEPS:
            generator = torch.Generator().manual_seed(derive_seed(run.seed, "validation", prompt))
            scale, side = run.validation_guidance_scale or 1.0, self._config.data.resolution
            if is_pixel_pipeline(pipeline):  # which draws the same noise itself, and takes none of one channel
                options = call_options(pipeline, [prompt], guidance_scale=scale, resolution=side)
                row += pipeline(**options, num_inference_steps=steps, generator=generator).images
                continue
            noise = torch.randn(shape, generator=generator)
            latents = pipeline_latents(
                pipeline, [prompt], noise, steps=steps, guidance_scale=scale, generator=generator
            )
            pixels = self._teacher.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
            row += pipeline.image_processor.numpy_to_pil(pixels)
        return row


def default_prompts(model: str | None, network: Any = None) -> tuple[str, ...]:
    """The prompts of a validation grid that nobody chose: the tiny teacher speaks of other things than its elders.

    network: what draws; a class-conditional one has a name for each of its classes.
    """
    from lcmdistill.teachers import resolve_alias

    if type(network).__name__ == "UNet2DModel":
        return class_names(network) or UNTOLD
    own = Path(resolve_alias(model or "")) / "prompts-validation.txt"
    return tuple(read_prompts(str(own))) if own.is_file() else PROMPTS
