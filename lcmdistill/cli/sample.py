"""`lcmdistill sample`."""

import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcmdistill.cli._options import Debug, Device, finite, model_or_run
from lcmdistill.utils.errors import Interrupted, UsageError, is_utf8
from lcmdistill.utils.units import counted

SchedulerName = Literal["lcm", "tcd", "ddim", "euler", "euler-a", "heun", "dpm++", "unipc"]

logger = logging.getLogger(__name__)


def sample(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Run (folder, or name under runs/), pipeline folder or hub id.  [default: the newest run under runs/]"
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--model", help="Base model for --lora (same as the MODEL argument).")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA file or folder (kohya, diffusers, peft); repeatable, such as a style LoRA with an LCM-LoRA."
        ),
    ] = None,
    lora_scale: Annotated[
        list[float] | None, typer.Option(help="Weight of each --lora, in order.  [default: 1]")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one per line.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Sampling steps; students need 1 to 8.  [default: the method's, usually 4]"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance in diffusers' convention (omega + 1).  "
            "[default: the run's value, otherwise the published one or 8.5; 1 with a LoRA, except FLUX.1]",
            callback=finite,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="Negative prompt. Only for students trained with --guidance free, or by a method without guidance."
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Stochasticity of TCD (gamma): the share of fresh noise per step, 0 to 1.  [default: 0.3 for TCD students]"
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="VAE to use instead of the model's own (file, folder or hub id).")
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="Text encoder to use instead of the model's own; repeatable for SDXL.")
    ] = None,
    parts_from: Annotated[
        str | None,
        typer.Option("--base", help="Model that supplies the parts that a single file lacks, such as its VAE."),
    ] = None,
    prediction_type: Annotated[
        Literal["epsilon", "sample", "v_prediction"] | None,
        typer.Option(
            help="Prediction type, if the model's files omit it or state it wrongly.  [default: as its files state]"
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of CLIP layers to skip, counted as in diffusers: 1 is A1111's clip skip 2, or 3 for SDXL.  "
            "[default: the run's value]",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image; the next ones count up.")
    ] = 0,
    num_images: Annotated[int, typer.Option(min=1, max=10**6, help="Images per prompt.")] = 1,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, max=16384, help="Side of a square in pixels.  [default: the run's resolution]"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=8, max=16384, help="Image width in pixels.  [default: the run's resolution]"),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(min=8, max=16384, help="Image height in pixels.  [default: the run's resolution]"),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Image to start from (image to image), or to repaint with an inpainting model.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="With --image: how much may change; this share of the steps is taken.  [default: 0.6; 1 with --mask]",
        ),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Inpainting models: the mask; white areas are repainted.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=65536, help="Images generated at once; does not change the images.")
    ] = 4,
    scheduler: Annotated[
        SchedulerName | None, typer.Option(help="Sample with another scheduler.  [default: the model's own]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the images; no file is overwritten.  [default: RUN/images, otherwise images/]"),
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None,
        typer.Option(help="Precision of the networks.  [default: the run's precision on CUDA, otherwise fp32]"),
    ] = None,
    debug: Debug = False,
) -> list[Any]:
    """Generate images: PNGs with embedded settings, plus a grid."""
    from lcmdistill.data.sources.teacher import read_prompts
    from lcmdistill.sampling import generate as sampling
    from lcmdistill.sampling.png import GeneratedImage, ImageFolder
    from lcmdistill.sampling.prompts import default_prompts
    from lcmdistill.sampling.variations import start_image, use_scheduler
    from lcmdistill.teachers.naming import public_name
    from lcmdistill.teachers.prompts import count_truncated, token_limit
    from lcmdistill.utils.device import pick_device
    from lcmdistill.utils.logging import progress

    if model and base:
        raise UsageError("pass either MODEL or --model, not both")
    if len(lora_scale or ()) > len(lora or ()):
        raise UsageError(f"{len(lora_scale or ())} --lora-scale were given for {len(lora or ())} --lora")
    if not all(math.isfinite(scale) for scale in lora_scale or ()):
        raise UsageError(f"--lora-scale is {', '.join(map(str, lora_scale or ()))}; each must be a finite number")
    if strength is not None and image is None:
        raise UsageError("--strength is for --image; remove this option, or add --image FILE")
    picture, painted = sampling.read_image_and_mask(image, mask)
    found = sampling.find_model(model_or_run(model or base))
    steps = steps or found.steps
    size = sampling.image_size(found, resolution, width, height)
    loras = [*found.loras, *(lora or ())]
    texts = list(prompt or []) + (read_prompts(str(prompts)) if prompts else [])
    for text in (*texts, negative_prompt or ""):
        if not is_utf8(text):
            raise UsageError(
                f"--prompt {text!a} is not UTF-8; set the terminal's encoding to UTF-8, or use --prompts FILE"
            )
    scales = [*[1.0] * len(found.loras), *(lora_scale or ())]
    scales += [1.0] * (len(loras) - len(scales))
    changes = {"vae": vae, "text_encoder": text_encoder or None, "base": parts_from, "prediction_type": prediction_type}
    changes |= {"clip_skip": clip_skip}
    options = {**found.options, **{name: value for name, value in changes.items() if value is not None}}
    target = pick_device(device)
    dtype = sampling.sampling_dtype(precision, found.precision, target)
    pipeline = sampling.load_student(found.path, target, loras, scales, options, found.scheduler, dtype)
    if scheduler:
        pipeline, note = use_scheduler(pipeline, scheduler)
        if note:
            logger.info(note)
    start = None
    if picture is not None and painted is None:
        wanted_size = None if resolution is None and width is None and height is None else size
        share = 0.6 if strength is None else strength
        start = start_image(pipeline, picture, share, steps, wanted_size, found.resolution)
    default_guidance = found.guidance_scale or sampling.default_guidance_scale(pipeline, has_loras=bool(loras))
    guidance = guidance_scale if guidance_scale is not None else default_guidance
    texts = texts or list(default_prompts(found.teacher, pipeline))
    if warning := sampling.guidance_warning(found, guidance):
        logger.info(warning)
    if cut := count_truncated(pipeline, [*texts, *([negative_prompt] if negative_prompt else [])]):
        logger.info(
            f"{cut} of the prompts are longer than the {token_limit(pipeline)} tokens that are read, and are cut there"
        )
    wanted = [text for text in texts for _ in range(num_images)]
    if output and output.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not output.is_dir():
        raise UsageError(f"--output {output} is the name of an image; pass a folder: images are numbered in it")
    folder = ImageFolder(
        output or (found.folder or Path()) / "images",
        model=public_name(str(found.folder) if found.folder and not found.loras else found.path),
        steps=steps,
        guidance_scale=guidance,
        sampler=sampling.sampler_name(pipeline),
        loras=[(public_name(each), scale) for each, scale in zip(loras, scales, strict=True)],
    )
    written: list[Path] = []
    with kept_images(written, len(wanted)), progress("generating", len(wanted)) as bar:

        def keep(finished: list[GeneratedImage]) -> None:
            written.extend(folder.write(finished))
            bar.update(len(written))

        images = sampling.generate(
            pipeline,
            wanted,
            [seed + i for i in range(len(wanted))],
            steps=steps,
            guidance_scale=guidance,
            size=size,
            image_and_mask=(picture, painted) if picture is not None and painted is not None else None,
            start=start,
            strength=strength if painted is not None else None,
            eta=eta,
            negative_prompt=negative_prompt,
            batch_size=batch_size,
            on_images=keep,
        )
    what = f"{counted(len(images), 'image')} at {counted(steps, 'step')}, guidance scale {guidance:g}"
    shown = written[0] if len(written) == 1 else f"{folder.folder}, all in {folder.write_grid()}"
    logger.info(f"{what}: {shown}")
    return images


@contextmanager
def kept_images(written: list[Path], wanted: int) -> Iterator[None]:
    """After Ctrl-C, name what was written before it."""
    try:
        yield
    except KeyboardInterrupt:
        if written:
            message = f"stopped after {len(written)} of {counted(wanted, 'image')}; they are in {written[0].parent}"
            raise Interrupted(message, signal.SIGINT) from None
        raise
