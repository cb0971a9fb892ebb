"""Pixel space: an unconditional or class-conditional U-Net that denoises images themselves.

The scheduler in the teacher's folder decides what the network is:

- EDMEulerScheduler: the raw F of EDM's preconditioning (Karras et al. 2022), on the noise levels of Consistency Models. EDM's
  time input is ln(sigma) / 4, and that is what diffusers passes; Consistency Models and their pipeline pass 1000 times as
  much, and a student starts from the teacher's weights. A teacher trained that way states `"_timestep_scale": 1000` in its
  scheduler's config; any other is refused.
- A scheduler with betas (DDPM, DDIM, ...): a VP denoiser in discrete time.

A class-conditional network may name its classes with `"_labels": [...]` in the U-Net's config, one name per class; one class
more than names is the null class. diffusers keeps config keys that begin with _, without a warning.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lcmdistill.config.schema import LORA_MODULES
from lcmdistill.teachers.family import TeacherFamily, no_condition, usual_student_scheduler
from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.schedules import NoiseSchedule
    from lcmdistill.diffusion.types import Conditioning

TIMESTEP_SCALE = 1000.0
"how many times EDM's ln(sigma) / 4 the network's time input is, in Consistency Models"

UNCONDITIONAL_ROWS = ("image 1", "image 2", "image 3", "image 4")
"rows of a validation grid for a network without prompts; each row has its own noise"


def call_unet_2d(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """Return the raw output, (B, C, H, W), in the network's own dtype; `c` holds class_labels (B,) int64 or nothing."""
    from lcmdistill.teachers.base import dtype_of

    return unet(z.to(dtype_of(unet)), t, c.get("class_labels"), return_dict=False)[0]


def class_names(unet: Any) -> tuple[str, ...]:
    """Return the names of a network's classes, or their numbers where they have no names; () if it is unconditional."""
    count, labels = unet.config.get("num_class_embeds"), unet.config.get("_labels")
    return tuple(labels or map(str, range(count or 0)))


def class_labels(unet: Any, prompts: Sequence[str]) -> Tensor | None:
    """Return the classes that prompts name, (B,) int64; "" is the null class. None if the network is unconditional.

    Raises:
        UsageError: A prompt is not a class name.
    """
    import torch

    names = class_names(unet)
    if not names:
        return None
    numbers = {name.lower(): i for i, name in enumerate(names)}
    if unet.config.num_class_embeds > len(names):
        numbers[""] = len(names)
    unknown = [prompt for prompt in prompts if prompt.lower() not in numbers]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a class of this model; choose from {', '.join(names)}")
    return torch.tensor([numbers[prompt.lower()] for prompt in prompts])


def _rejects(pipeline: Any, caption: str) -> str | None:
    """Return why a caption cannot be used; an unconditional network accepts any caption, and none."""
    names = class_names(pipeline.unet)
    known = not names or caption.lower() in {name.lower() for name in names}
    return None if known else "caption names no class of the teacher"


class IdentityVae:
    """Passes pixels through where a VAE is expected: the latents are the pixels."""

    device = "cpu"

    def __init__(self, channels: int) -> None:
        """Take the number of channels: 1 (gray) or 3."""
        self.config = SimpleNamespace(latent_channels=channels, scaling_factor=1.0)

    @property
    def dtype(self) -> Any:
        """The dtype of pixels: fp32."""
        import torch

        return torch.float32

    def state_dict(self) -> dict[str, Tensor]:
        """Return no weights."""
        return {}

    def encode(self, pixels: Tensor) -> Any:
        """Return pixels as a posterior without spread, averaged to one channel for a gray network."""
        mean = pixels if self.config.latent_channels == 3 else pixels.mean(1, keepdim=True)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.new_zeros(mean.shape)))

    def decode(self, latents: Tensor) -> Any:
        """Return pixels with three channels."""
        return SimpleNamespace(sample=latents.expand(-1, 3, -1, -1))


def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return the prompts' classes, (B,) int64.

    Without a null class the empty prompt changes nothing, and guidance has no effect.
    """
    from lcmdistill.diffusion.types import Conditioning

    unet = pipeline.unet
    if not any(prompts) and unet.config.num_class_embeds == len(class_names(unet)):
        return Conditioning({})
    labels = class_labels(unet, prompts)
    return Conditioning({} if labels is None else {"class_labels": labels.to(unet.device)})


def _example_inputs(unet: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return classes (B,) for a class-conditional network."""
    import torch

    count = unet.config.get("num_class_embeds")
    return {"class_labels": torch.arange(batch) % count} if count else {}


def _check(pipeline: Any) -> None:
    """Raise UsageError on a network whose channels are not an image's, or whose classes are not plain labels."""
    config = pipeline.unet.config
    if config.in_channels not in (1, 3) or config.out_channels != config.in_channels:
        raise UsageError(
            f"the teacher's U-Net takes {config.in_channels} channels and returns {config.out_channels}; a teacher in pixel "
            "space takes and returns 1 or 3"
        )
    if config.class_embed_type is not None:
        raise UsageError(f"the teacher's class_embed_type is {config.class_embed_type!r}; it must be none")


def _sample(
    pipeline: Any,
    schedule: NoiseSchedule,
    prediction_type: str,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Generate images (B, C, H, W) with Heun's solver on the schedule's grid.

    On Karras's grid this is EDM's deterministic sampler (Karras et al. 2022, Alg. 1).
    """
    import torch

    from lcmdistill.diffusion.parameterization import X0Eps, guided
    from lcmdistill.diffusion.solvers import solve
    from lcmdistill.diffusion.types import x0_eps_network

    def raw(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> Tensor:
        return call_unet_2d(unet, z, t, c.values, w).float()

    unet, c = pipeline.unet, _encode_prompts(pipeline, prompts)
    on_device, noise = schedule.to(unet.device), noise.to(unet.device)
    network = x0_eps_network(raw, on_device, prediction_type)
    w = torch.full((len(noise),), guidance_scale - 1.0, device=unet.device)

    def psi(z: Tensor, t: Tensor) -> X0Eps:
        cond = network(z, t, c, None)
        if guidance_scale == 1.0 or not c.values:
            return cond
        return guided(cond, network(z, t, c.with_prompt(_encode_prompts(pipeline, [""])), None), w)

    return solve(psi, on_device, noise, steps)


def _denoiser(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """Return the schedule and the prediction type that a scheduler's config describes.

    Raises:
        UsageError: The scheduler does not belong to a denoiser that a student can start from.
    """
    from lcmdistill.diffusion.parameterization import EDM
    from lcmdistill.diffusion.schedules import SIGMA_DATA, KarrasSchedule
    from lcmdistill.teachers.schedulers import vp_denoiser

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
            f'student could start from it; a teacher trained on the latter has "_timestep_scale": {TIMESTEP_SCALE:g} and '
            "epsilon as its prediction_type in its scheduler's config"
        )
    if config["sigma_data"] != SIGMA_DATA:
        raise UsageError(f"the teacher's sigma_data is {config['sigma_data']}; it must be {SIGMA_DATA}")
    sigmas = {key: config[key] for key in ("sigma_min", "sigma_max", "rho")}
    return KarrasSchedule(**sigmas), EDM


def _student_scheduler(
    schedule: NoiseSchedule, config: Mapping[str, Any], name: str, options: Mapping[str, Any]
) -> Any:
    """Return Consistency Models' scheduler for Karras's schedule, and the named one for a VP schedule."""
    from diffusers import CMStochasticIterativeScheduler

    from lcmdistill.diffusion.schedules import SIGMA_DATA, KarrasSchedule

    if not isinstance(schedule, KarrasSchedule):
        return usual_student_scheduler(schedule, config, name, options)
    return CMStochasticIterativeScheduler(
        num_train_timesteps=schedule.num_steps,
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        sigma_data=SIGMA_DATA,
        rho=schedule.rho,
    )


def _prompt_kwargs(pipeline: Any, prompts: Sequence[str], negative: str | None = None) -> dict[str, Any]:
    """Return the batch size and the classes that prompts name; there are no negative prompts."""
    return {"batch_size": len(prompts), "class_labels": class_labels(pipeline.unet, prompts)}


PIXEL_SPACE = TeacherFamily(
    key="pixel",
    title="pixel space",
    pipeline_classes=("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline"),
    network="unet",
    network_class="UNet2DModel",
    network_label="U-Net",
    text_encoders=(),
    task="unconditional-image-generation",
    tags=("image-generation",),
    in_pixels=True,
    input_channels=3,
    call=call_unet_2d,
    example_inputs=_example_inputs,
    network_kwargs=lambda family, unet, inputs: dict(inputs),
    encode_prompts=_encode_prompts,
    condition=no_condition,
    prompt_kwargs=_prompt_kwargs,
    default_prompts=lambda pipeline: class_names(pipeline.unet) or UNCONDITIONAL_ROWS,
    takes_captions=lambda config: config.get("num_class_embeds") is not None,
    rejects=_rejects,
    own_prompts=lambda pipeline: class_names(pipeline.unet),
    check=_check,
    vae=lambda pipeline: IdentityVae(pipeline.unet.config.in_channels),
    denoiser=_denoiser,
    sampler=_sample,
    student_scheduler=_student_scheduler,
    student_pipeline_class=lambda has_omega_input, has_options: "ConsistencyModelPipeline",
    published={"data.guidance_scale": 1.0},  # EDM and Consistency Models sample their teachers without guidance
    lora_modules=LORA_MODULES,
    lora_formats=(),  # no program reads a LoRA for such a network
    lora_prefixes={},
    layouts=(),
    layout_of=None,
    onnx_classes={},
    clip_skip=None,
    aliases={},
    describe=lambda pipeline_class, config: "pixel space",
)
