"""What every family of teachers looks like from above.

Shapes: B batch, C latent channels, h w latent size, H W pixels, L tokens, D width.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lcmdistill.diffusion.consistency import OMEGA_DIM, omega_embedding
from lcmdistill.diffusion.parameterization import PREDICTION_TYPES
from lcmdistill.diffusion.schedules import NoiseSchedule, vp_schedule
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.pipelines import pipeline_latents
from lcmdistill.utils.errors import UsageError

# (network, z, t, c, w) -> raw output: how a family's network is asked. c: a Conditioning's values; w is ignored by a
# network without an omega input.
Call = Callable[[Any, Tensor, Tensor, Mapping[str, Tensor], Tensor | None], Tensor]

# Height and width of an original, top and left of the crop in the resized image, height and width of what was kept: pixels.
Frame = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class SampleInfo:
    """What samples show, as far as a network is told of it besides the prompt.

    frames: (B, 6) fp32, each a Frame; pixels: () -> (B, 3, H, W) in [-1, 1], made when it is asked for; encode: from pixels to
    scaled latents (B, C, h, w); seeds: one for each sample, for what is drawn at random.
    """

    frames: Tensor
    pixels: Callable[[], Tensor]
    encode: Callable[[Tensor], Tensor]
    seeds: Sequence[int]


def whole_frame(height: int, width: int) -> Frame:
    """The frame of an image that nothing was cut off, as of one that a teacher draws itself."""
    return (height, width, 0, 0, height, width)


def needs_caption(caption: str) -> str | None:
    """Why a sample of this caption cannot be used, None if it can: of a network that is told in words what it shall draw."""
    return None if caption else "no caption"


def no_condition(shown: SampleInfo) -> Conditioning:
    """Of a network that is told nothing but the prompt."""
    return Conditioning({})


@dataclass(frozen=True)
class Teacher:
    """A trained latent diffusion model and what it needs around it. All weights are fp32 and frozen.

    pipeline: the diffusers pipeline it came in, which also draws its images; call: how its network, or a student of the
    same class, is asked; encode_prompts: what prompts alone decide of the Conditioning, the empty one as the pipeline's own
    unconditional; condition: what samples decide of it; published: {"section.key": value} for its family.
    """

    pipeline: Any
    network: Any
    vae: Any
    schedule: NoiseSchedule
    prediction_type: str
    call: Call
    encode_prompts: Callable[[Sequence[str]], Conditioning]
    condition: Callable[[SampleInfo], Conditioning] = no_condition
    condition_is_random: bool = False
    "whether `condition` draws at random"
    published: Mapping[str, Any] = field(default_factory=dict)
    rejects: Callable[[str], str | None] = needs_caption
    "why a sample of a caption cannot be used"
    own_prompts: tuple[str, ...] = ()
    "what it draws where nobody named prompts and the bundled ones are not for it"
    draw: Callable[[Sequence[str], Tensor, int, float], Tensor] | None = None
    "(prompts, noise, steps, guidance_scale) -> latents, where no pipeline of diffusers draws with such a network"

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel, read from the VAE's config."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def in_pixels(self) -> bool:
        """Whether there is no VAE, and the latents are the pixels."""
        return "vae" not in self.pipeline.components

    @property
    def network_name(self) -> str:
        """What the pipeline calls the network: "unet", or "transformer"."""
        return next(name for name, part in self.pipeline.components.items() if part is self.network)

    @property
    def usual(self) -> dict[str, Any]:
        """Settings that fit it where nobody chooses others, {"section.key": value}: those published for its family,
        and the resolution it was trained at."""
        side = self.network.config.get("sample_size")
        return {**self.published, **({"data.resolution": side * self.vae_factor} if isinstance(side, int) else {})}

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of, in pixels: the VAE and the network divide them, and diffusers."""
        return math.lcm(self.vae_factor * self.network.config.get("patch_size", 1), 8)

    def example(
        self, batch: int, size: int | tuple[int, int], device: torch.device | str
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Inputs (z, t, c) of the shapes that training has: nothing but zeros, and a prompt of its own.

        size: of the images in pixels, a square's side or (height, width).
        """
        height, width = (size, size) if isinstance(size, int) else size
        channels, factor = self.vae.config.latent_channels, self.vae_factor
        z = torch.zeros(batch, channels, height // factor, width // factor, device=device)
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        shown = SampleInfo(
            frames=torch.tensor([whole_frame(height, width)] * batch, dtype=torch.float32),
            pixels=lambda: torch.zeros(batch, 3, height, width),
            encode=lambda pixels: torch.zeros(z.shape),
            seeds=range(batch),
        )
        prompt = self.own_prompts[0] if self.own_prompts else ""
        return z, t, self.encode_prompts([prompt]).to(device).expand(batch) | self.condition(shown).to(device)

    def to(self, device: torch.device | str) -> None:
        """Put all of it on a device but the safety checker, which looks at no latents."""
        checker = self.pipeline.components.get("safety_checker")
        self.pipeline.to(device)
        if checker is not None:
            checker.to("cpu")

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents' posterior, each (B, C, h, w) fp32.

        pixels: (B, 3, H, W) in [-1, 1]. Scale and shift are the VAE's own.
        """
        config = self.vae.config
        posterior = self.vae.encode(pixels.to(self.vae.device, torch.float32)).latent_dist
        shift = getattr(config, "shift_factor", None) or 0.0
        return (posterior.mean.float() - shift) * config.scaling_factor, posterior.std.float() * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, 3, H, W), of scaled latents (B, C, h, w)."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        pixels = self.vae.decode(
            (latents.to(self.vae.device).float() / config.scaling_factor + shift).to(self.vae.dtype)
        )
        return (pixels.sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def generate_latents(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        dtype: torch.dtype = torch.float32,
        **scheduler_options: Any,
    ) -> Tensor:
        """The teacher's own scaled latents for prompts, (B, C, h, w) fp32.

        noise: (B, C, h, w), the start of each trajectory; guidance_scale: diffusers' convention, omega + 1; scheduler:
        the name of a deterministic diffusers scheduler class, built from the teacher's own scheduler config (a teacher that
        draws by itself has its own way); dtype: of autocast around the network; scheduler_options: what the scheduler's
        config is to say differently.
        """
        if self.draw is not None:
            with torch.autocast(self.network.device.type, dtype=dtype, enabled=dtype != torch.float32):
                return self.draw(prompts, noise, steps, guidance_scale).float()
        import diffusers

        before = self.pipeline.scheduler
        self.pipeline.scheduler = getattr(diffusers, scheduler).from_config(before.config, **scheduler_options)
        try:
            # Only an inpainting pipeline draws anything at random: the encoding of the image that it is shown.
            fixed = [torch.Generator().manual_seed(0) for _ in prompts]
            return pipeline_latents(
                self.pipeline,
                prompts,
                noise,
                steps=steps,
                guidance_scale=guidance_scale,
                dtype=dtype,
                generator=fixed,
            )
        finally:
            self.pipeline.scheduler = before

    def fingerprint(self, *, with_network: bool) -> str:
        """A hash of all that makes latents and embeddings; with_network also covers what draws them."""
        config = self.vae.config
        about: list[Any] = [config.scaling_factor, getattr(config, "shift_factor", None), type(self.pipeline).__name__]
        own = self.network.config
        about += [
            config.latent_channels,
            own.get("num_class_embeds"),
            own.get("_labels"),
        ]  # in pixel space no weights tell
        told = self.pipeline.config
        about += [told[key] for key in ("_vae", "_clip_skip") if told.get(key)]
        parts = [self.vae, *(m for k, m in self.pipeline.components.items() if k.startswith("text_encoder") and m)]
        if with_network:
            about += sorted(item for item in self.pipeline.scheduler.config.items() if not item[0].startswith("_"))
            parts.append(self.network)
        digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
        for module in parts:
            digest.update(_weights_digest(module))
        return digest.hexdigest()


_DIGESTS: WeakKeyDictionary[nn.Module, tuple[Any, bytes]] = WeakKeyDictionary()
"a module -> what its weights could be told by, and the digest that they had"


def _weights_digest(module: nn.Module) -> bytes:
    """A hash of a module's weights: gigabytes, so each core takes some, and once for as long as nothing writes to them."""
    state = sorted(module.state_dict().items())
    # What writes behind a tensor's version, as peft does where it merges, writes to all of it.
    some = [bytes(_bytes(value.reshape(-1)[:: 1 + value.numel() // 64])) for _, value in state]
    now = [(name, value.dtype, value._version, part) for (name, value), part in zip(state, some, strict=True)]
    known, digest = _DIGESTS.get(module, (None, b""))
    if known == now:
        return digest

    def of_one(item: tuple[str, Tensor]) -> bytes:
        return item[0].encode() + hashlib.blake2b(_bytes(item[1]), digest_size=16).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digest = b"".join(threads.map(of_one, state))
    _DIGESTS[module] = now, digest
    return digest


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def ends_in_noise(schedule: NoiseSchedule) -> bool:
    """Whether nothing of the image is left at the last time step: zero-terminal SNR."""
    return float(schedule.alpha(torch.tensor([schedule.num_steps - 1]))) == 0.0


def vp_denoiser(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The schedule and the prediction type of the network that belongs to a diffusers scheduler's config.

    Raises UsageError on one that is not known.
    """
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"the teacher predicts {prediction_type!r}; supported are {', '.join(PREDICTION_TYPES)}")
    import diffusers

    # A scheduler keeps what its config file says for other classes, as that which was there before it.
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if "beta_schedule" not in (signature(kind.__init__).parameters if kind else config):
        raise UsageError(
            f"the teacher's scheduler is a {config.get('_class_name')}, which has no betas: it was trained in another frame "
            "(EDM's, flow matching), which is not supported here; give a teacher of a variance-preserving schedule"
        )
    try:
        schedule = vp_schedule(config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if prediction_type == "epsilon" and ends_in_noise(schedule):
        raise UsageError(
            "the teacher's schedule ends at alpha = 0 (zero-terminal SNR), where students begin to draw and an epsilon "
            "prediction tells nothing of the image; if it really predicts v, pass --prediction-type v_prediction"
        )
    return schedule, prediction_type


def vp_teacher(
    pipeline: Any,
    network: Any,
    call: Call,
    encode_prompts: Callable[[Sequence[str]], Conditioning],
    condition: Callable[[SampleInfo], Conditioning] = no_condition,
) -> Teacher:
    """A Teacher of a pipeline with a VAE, whose scheduler's config tells the rest; everything in it is frozen.

    Raises UsageError on a schedule or prediction type that is not known.
    """
    schedule, prediction_type = vp_denoiser(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return Teacher(
        pipeline=pipeline,
        network=network,
        vae=pipeline.vae,
        schedule=schedule,
        prediction_type=prediction_type,
        call=call,
        encode_prompts=encode_prompts,
        condition=condition,
    )


def has_omega_input(network: Any) -> bool:
    """Whether a network has an omega input (`time_cond_proj_dim`); one that has none draws at the guidance it was given."""
    return network.config.get("time_cond_proj_dim") is not None


def supports_omega_input(network: Any) -> bool:
    """Whether the class of a network has an omega input, which a full student of it is then given."""
    return "time_cond_proj_dim" in network.config


def with_omega_input(network: Any) -> dict[str, Any]:
    """A network's config with an omega input added, to be made anew by `from_config`.

    diffusers notes which keys a config file did not have, as that of Stable Diffusion 1.5 has few, and drops them again.
    """
    told = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    return {**told, "time_cond_proj_dim": OMEGA_DIM}


def omega_input(network: Any, w: Tensor | None) -> Tensor | None:
    """The `timestep_cond` that a network is to be given for omega, in its own dtype; None if it takes none. w: (B,)."""
    if w is None or not has_omega_input(network):
        return None
    return omega_embedding(w, network.config.time_cond_proj_dim).to(dtype_of(network))


def dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of a network's first weights. diffusers' own `dtype` goes through all modules, at every forward."""
    return next(network.parameters()).dtype
