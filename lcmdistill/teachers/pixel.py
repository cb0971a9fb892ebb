"""Pixel space: a UNet2DModel, unconditional or class-conditional, that denoises images themselves.

What the network is, its folder's scheduler says:

- An EDMEulerScheduler: the raw F of EDM's preconditioning (Karras et al. 2022), in the frame of Consistency Models. EDM's
  own time input is ln(sigma) / 4, which is what diffusers gives; Consistency Models and their pipeline give 1000 times as
  much, and a student starts from the teacher's weights. A teacher that was trained so says `"_timestep_scale": 1000` in its
  scheduler's config; any other is refused.
- A scheduler with betas (DDPM, DDIM, ...): a VP denoiser, in discrete time.

A class-conditional network may name its classes: `"_labels": [...]` in the U-Net's config, a name a class; one class more
than names is that of no class in particular. (diffusers keeps keys that begin with _, and says nothing of them.)
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.diffusion.parameterization import EDM, X0Eps, guided
from lcmdistill.diffusion.schedules import SIGMA_DATA, KarrasSchedule, NoiseSchedule
from lcmdistill.diffusion.solvers import solve
from lcmdistill.diffusion.types import Conditioning, x0_eps_network
from lcmdistill.teachers.base import Teacher, dtype_of, vp_denoiser
from lcmdistill.utils.errors import UsageError

TIMESTEP_SCALE = 1000.0
"how often a network's time input holds EDM's ln(sigma) / 4, in Consistency Models"


def call_unet_2d(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """A UNet2DModel's raw output, (B, C, H, W), in its own dtype. c: class_labels (B,) int64, or nothing."""
    return unet(z.to(dtype_of(unet)), t, c.get("class_labels"), return_dict=False)[0]


def class_names(unet: Any) -> tuple[str, ...]:
    """The names of a UNet2DModel's classes, or their numbers where it has no names; none if it is unconditional."""
    classes, named = unet.config.get("num_class_embeds"), unet.config.get("_labels")
    return tuple(named or map(str, range(classes or 0)))


def class_labels(unet: Any, prompts: Sequence[str]) -> Tensor | None:
    """The classes that prompts name, (B,) int64; "" is no class in particular. None if the network is unconditional.

    Raises UsageError for a name that is no class's.
    """
    names = class_names(unet)
    if not names:
        return None
    numbers = {name.lower(): i for i, name in enumerate(names)}
    if unet.config.num_class_embeds > len(names):
        numbers[""] = len(names)
    unknown = [prompt for prompt in prompts if prompt.lower() not in numbers]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no class of this model; choose from {', '.join(names)}")
    return torch.tensor([numbers[prompt.lower()] for prompt in prompts])


def knows_caption(unet: Any, caption: str) -> bool:
    """Whether a caption names a class; any does, none at all included, where the network is unconditional."""
    names = class_names(unet)
    return not names or caption.lower() in {name.lower() for name in names}


class Pixels(nn.Module):
    """What stands in the place of a VAE: the pixels themselves are the latents. channels: 1 (grey) or 3."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=channels, block_out_channels=(channels,), scaling_factor=1.0)

    def encode(self, pixels: Tensor) -> Any:
        mean = pixels if self.config.latent_channels == 3 else pixels.mean(1, keepdim=True)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents.expand(-1, 3, -1, -1))


def pixel_space(pipeline: Any) -> Teacher:
    """A pipeline of a UNet2DModel and a scheduler as a Teacher; the latents are the pixels.

    Raises UsageError on a network with other channels than an image's, or a scheduler that is no denoiser's.
    """
    unet = pipeline.unet
    channels, out = unet.config.in_channels, unet.config.out_channels
    if channels not in (1, 3) or out != channels:
        raise UsageError(
            f"the teacher's U-Net takes {channels} channels and gives {out}; a teacher in pixel space takes and gives 1 or 3"
        )
    if unet.config.class_embed_type is not None:
        raise UsageError(f"the teacher's class_embed_type is {unet.config.class_embed_type!r}; it must be none")
    schedule, prediction_type = _denoiser(pipeline.scheduler.config)

    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        if not any(prompts) and unet.config.num_class_embeds == len(class_names(unet)):
            return Conditioning({})  # no class stands for none, and no prompt changes nothing: guidance has no effect
        labels = class_labels(unet, prompts)
        return Conditioning({} if labels is None else {"class_labels": labels.to(unet.device)})

    def raw(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return call_unet_2d(unet, z, t, c.values, w).float()

    def draw(prompts: Sequence[str], noise: Tensor, steps: int, guidance_scale: float) -> Tensor:
        """Heun's solver along the schedule's grid: on Karras's, EDM's deterministic sampler (Karras et al. 2022, Alg. 1)."""
        here, c, noise = schedule.to(unet.device), encode_prompts(prompts), noise.to(unet.device)
        network = x0_eps_network(raw, here, prediction_type)
        w = torch.full((len(noise),), guidance_scale - 1.0, device=unet.device)

        def psi(z: Tensor, t: Tensor) -> X0Eps:
            told = network(z, t, c, None)
            if guidance_scale == 1.0 or not c.values:
                return told
            return guided(told, network(z, t, c.with_prompt(encode_prompts([""])), None), w)

        return solve(psi, here, noise, steps)

    pipeline.set_progress_bar_config(disable=True)
    unet.eval().requires_grad_(False)
    return Teacher(
        pipeline=pipeline,
        network=unet,
        vae=Pixels(channels),
        schedule=schedule,
        prediction_type=prediction_type,
        call=call_unet_2d,
        encode_prompts=encode_prompts,
        rejects=lambda caption: None if knows_caption(unet, caption) else "caption names no class of the teacher",
        own_prompts=class_names(unet),
        published={"data.guidance_scale": 1.0},  # EDM's and Consistency Models' teachers draw without guidance
        draw=draw,
    )


def _denoiser(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The schedule and the prediction type of the network that belongs to a scheduler. Raises UsageError."""
    kind = str(config.get("_class_name"))
    if kind == "CMStochasticIterativeScheduler":
        raise UsageError(
            "the teacher is a consistency model already: its scheduler is a CMStochasticIterativeScheduler"
        )
    if not kind.startswith("EDM"):
        return vp_denoiser(config)
    if config.get("_timestep_scale") != TIMESTEP_SCALE or config.get("prediction_type") != "epsilon":
        raise UsageError(
            "the teacher's network takes EDM's time, ln(sigma) / 4, and a consistency model's takes 250 ln(sigma), so that no "
            f'student could start from it; a teacher trained on that says "_timestep_scale": {TIMESTEP_SCALE:g} in its '
            "scheduler's config, and epsilon as its prediction_type"
        )
    if config["sigma_data"] != SIGMA_DATA:
        raise UsageError(f"the teacher's sigma_data is {config['sigma_data']}; it must be {SIGMA_DATA}")
    sigmas = {key: config[key] for key in ("sigma_min", "sigma_max", "rho")}
    return KarrasSchedule(**sigmas), EDM
