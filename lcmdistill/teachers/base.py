"""The contract of a teacher: a pipeline whose network, VAE, schedule and prompts the rest of the package uses.

Shapes: B batch, C latent channels, h w latent size, H W pixels, L tokens, D embedding width.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import LORA_MODULES, RunConfig
from lcmdistill.diffusion.consistency import OMEGA_DIM, omega_embedding
from lcmdistill.diffusion.parameterization import FLOW
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.teachers.family import Call, SampleInfo, TeacherFamily, needs_caption, no_condition, whole_frame
from lcmdistill.teachers.pipelines import pipeline_latents
from lcmdistill.teachers.schedulers import FLOW_SAMPLER, flow_denoiser, prepare_flow


@dataclass(frozen=True)
class Teacher:
    """A trained diffusion model with everything around it. All weights are fp32 and frozen.

    Attributes:
        family: What the package knows about pipelines of this kind.
        pipeline: The diffusers pipeline, which also generates the teacher's images.
        network: The pipeline's denoising network.
        vae: The pipeline's VAE; in pixel space, an object that passes pixels through.
        schedule: The noise schedule that the network was trained on.
        prediction_type: What the network predicts.
        call: How the network, or a student of the same class, is called.
        encode_prompts: Prompts -> the part of the Conditioning that they decide.
        condition: SampleInfo -> the part of the Conditioning that samples decide.
        rejects: Caption -> why a sample with it cannot be used; None if it can.
        own_prompts: The prompts to generate training data for where the bundled prompts do not apply.
        sampler: (prompts, noise, steps, guidance_scale) -> latents, where no diffusers pipeline samples such a network.
    """

    family: TeacherFamily
    pipeline: Any
    network: Any
    vae: Any
    schedule: NoiseSchedule
    prediction_type: str
    call: Call
    encode_prompts: Callable[[Sequence[str]], Conditioning]
    condition: Callable[[SampleInfo], Conditioning] = no_condition
    rejects: Callable[[str], str | None] = needs_caption
    own_prompts: tuple[str, ...] = ()
    sampler: Callable[[Sequence[str], Tensor, int, float], Tensor] | None = None

    @property
    def vae_factor(self) -> int:
        """The VAE's downscale factor: pixels per latent pixel."""
        return 1 if self.in_pixels else self.family.vae_factor(self.vae.config)

    @property
    def in_pixels(self) -> bool:
        """Whether there is no VAE, and the latents are the pixels."""
        return self.family.in_pixels

    @property
    def is_flow(self) -> bool:
        """Whether the network was trained with flow matching."""
        return self.prediction_type == FLOW

    def method(self, info: MethodInfo) -> MethodInfo:
        """Return what is known about a method, with the sampler of this teacher's students."""
        return info.for_teacher(is_flow=self.is_flow)

    @property
    def network_name(self) -> str:
        """The network's name in the pipeline: "unet" or "transformer"."""
        return self.family.network

    @property
    def encoders(self) -> tuple[torch.nn.Module, ...]:
        """The networks that prepare samples: VAE and text encoders."""
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        return tuple(part for name, part in parts.items() if name not in (self.network_name, "safety_checker"))

    @property
    def condition_is_random(self) -> bool:
        """Whether `condition` draws random numbers."""
        return self.family.condition_is_random

    @property
    def usual(self) -> dict[str, Any]:
        """Settings to use where none are specified, {"section.key": value}: the family's, and the native resolution."""
        size, modules = self.network.config.get("sample_size"), self.family.lora_modules
        side = min(size) if isinstance(size, list | tuple) else size
        return {
            **self.family.published,
            **({"student.target_modules": modules} if modules != LORA_MODULES else {}),
            **({"data.resolution": side * self.vae_factor} if isinstance(side, int) else {}),
        }

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of, in pixels: for the VAE, the network's patches, and diffusers."""
        return self.family.size_multiple(self.network.config, self.vae_factor)

    @property
    def largest_side(self) -> int | None:
        """The longest side of an image that the network can generate, in pixels; None if there is no such limit."""
        return self.family.largest_side(self.network.config, self.vae_factor)

    @property
    def applies_cfg(self) -> bool:
        """Whether its guidance is classifier-free, and not an input of the network."""
        return not self.family.embeds_guidance

    def in_run(self, config: RunConfig) -> "Teacher":
        """Return the teacher as a run uses it: with a shift for the run's resolution, and with its embedded guidance."""
        schedule, call, omegas = self.schedule, self.call, omega_range(config)
        scheduler = self.pipeline.scheduler.config
        if self.is_flow and scheduler.get("use_dynamic_shifting"):
            side = config.data.resolution / self.family.token_pixels(self.network.config, self.vae_factor)
            schedule, _ = flow_denoiser(scheduler, round(side**2))
        if self.family.embeds_guidance and omegas is not None:
            of_family: Any = self.family.call
            call = partial(of_family, guidance=omegas.middle)
        return replace(self, schedule=schedule, call=call)

    def example(
        self, batch: int, size: int | tuple[int, int], device: torch.device | str
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Return zeros in the shapes of training inputs (z, t, c), with a prompt that the teacher accepts.

        Args:
            batch: The batch size.
            size: The image size in pixels: the side of a square, or (height, width).
            device: Where the tensors are created.
        """
        height, width = (size, size) if isinstance(size, int) else size
        channels, factor = self.vae.config.latent_channels, self.vae_factor
        z = torch.zeros(batch, channels, height // factor, width // factor, device=device)
        t = torch.zeros(batch, dtype=self.schedule.grid(2).dtype, device=device)
        samples = SampleInfo(
            frames=torch.tensor([whole_frame(height, width)] * batch, dtype=torch.float32),
            pixels=lambda: torch.zeros(batch, 3, height, width),
            encode=lambda pixels: torch.zeros(z.shape),
            seeds=range(batch),
        )
        prompt = self.own_prompts[0] if self.own_prompts else ""
        return z, t, self.encode_prompts([prompt]).to(device).expand(batch) | self.condition(samples).to(device)

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device except the safety checker, which sees no latents."""
        checker = self.pipeline.components.get("safety_checker")
        self.pipeline.to(device)
        if checker is not None:
            checker.to("cpu")

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the scaled latents' posterior, each (B, C, h, w) fp32.

        Args:
            pixels: (B, 3, H, W) in [-1, 1]. The VAE's config specifies scale and shift.
        """
        config = self.vae.config
        posterior = self.vae.encode(pixels.to(self.vae.device, torch.float32)).latent_dist
        shift = getattr(config, "shift_factor", None) or 0.0
        return (posterior.mean.float() - shift) * config.scaling_factor, posterior.std.float() * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1]."""
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
        on_step: Callable[[], None] | None = None,
        **scheduler_options: Any,
    ) -> Tensor:
        """Generate scaled latents for prompts, (B, C, h, w) fp32.

        Args:
            prompts: One per sample.
            noise: (B, C, h, w), the start of each trajectory.
            steps: The number of sampling steps.
            guidance_scale: In diffusers' convention, omega + 1.
            scheduler: A deterministic diffusers scheduler class, configured as the teacher's own scheduler. Teachers with a
                `sampler` of their own ignore it, and flow-matching ones are sampled with Euler's method.
            dtype: The autocast dtype around the network.
            on_step: Called after each step; not by teachers with a `sampler` of their own.
            scheduler_options: Config values that differ from the teacher's.
        """
        if self.sampler is not None:
            with torch.autocast(self.network.device.type, dtype=dtype, enabled=dtype != torch.float32):
                return self.sampler(prompts, noise, steps, guidance_scale).float()
        import diffusers

        before = self.pipeline.scheduler
        if self.is_flow:  # whose times the pipeline call decides
            scheduler, scheduler_options = FLOW_SAMPLER, {}
        changed = getattr(diffusers, scheduler).from_config(before.config, **scheduler_options)
        self.pipeline.scheduler = prepare_flow(changed)
        if on_step is not None:
            _report_steps(self.pipeline.scheduler, on_step)
        try:
            # Only inpainting pipelines draw random numbers: they sample the encoding of the masked image.
            generators = [torch.Generator().manual_seed(0) for _ in prompts]
            return pipeline_latents(
                self.pipeline,
                prompts,
                noise,
                steps=steps,
                guidance_scale=guidance_scale,
                dtype=dtype,
                generator=generators,
            )
        finally:
            self.pipeline.scheduler = before

    def fingerprint(self, *, with_network: bool) -> str:
        """Return a hash of everything that latents and embeddings depend on.

        Args:
            with_network: Whether to include the network and its scheduler, which generate latents.
        """
        config, network = self.vae.config, self.network.config
        values: list[Any] = [config.scaling_factor, getattr(config, "shift_factor", None), type(self.pipeline).__name__]
        # In pixel space there are no weights besides the network's.
        values += [config.latent_channels, network.get("num_class_embeds"), network.get("_labels")]
        values += [self.pipeline.config[key] for key in ("_vae", "_clip_skip") if self.pipeline.config.get(key)]
        parts = [self.vae, *(m for k, m in self.pipeline.components.items() if k.startswith("text_encoder") and m)]
        if with_network:
            values += sorted(item for item in self.pipeline.scheduler.config.items() if not item[0].startswith("_"))
            parts.append(self.network)
        digest = hashlib.blake2b(repr(values).encode(), digest_size=16)
        for module in parts:
            digest.update(_weights_digest(module))
        return digest.hexdigest()


def _report_steps(scheduler: Any, on_step: Callable[[], None]) -> None:
    """Let a scheduler call a function after each of its steps."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines read its arguments
    def reported(*arguments: Any, **keywords: Any) -> Any:
        result = step(*arguments, **keywords)
        on_step()
        return result

    scheduler.step = reported


_DIGESTS: WeakKeyDictionary[Any, tuple[Any, bytes]] = WeakKeyDictionary()
"module -> a cheap signature of its weights, and the digest they had then"


def _weights_digest(module: Any) -> bytes:
    """Return a hash of a module's weights, computed on all cores and again only after something wrote to them."""
    state = sorted(module.state_dict().items())
    # peft merges without changing a tensor's version, and then writes to all of it: 64 of its values show that.
    samples = [bytes(_bytes(value.reshape(-1)[:: 1 + value.numel() // 64])) for _, value in state]
    signature = [
        (name, value.dtype, value._version, sample) for (name, value), sample in zip(state, samples, strict=True)
    ]
    known, digest = _DIGESTS.get(module, (None, b""))
    if known == signature:
        return digest

    def hash_one(item: tuple[str, Tensor]) -> bytes:
        return item[0].encode() + hashlib.blake2b(_bytes(item[1]), digest_size=16).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digest = b"".join(threads.map(hash_one, state))
    _DIGESTS[module] = signature, digest
    return digest


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def make_teacher(family: TeacherFamily, pipeline: Any) -> Teacher:
    """Return a pipeline of a family as a Teacher, and freeze its weights.

    Raises:
        UsageError: The pipeline lacks parts of its family, or its schedule or prediction type is not supported.
    """
    family.check(pipeline)
    schedule, prediction_type = family.denoiser(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return Teacher(
        family=family,
        pipeline=pipeline,
        network=getattr(pipeline, family.network),
        vae=family.vae(pipeline),
        schedule=schedule,
        prediction_type=prediction_type,
        call=family.call,
        encode_prompts=partial(family.encode_prompts, pipeline),
        condition=family.condition,
        rejects=partial(family.rejects, pipeline),
        own_prompts=family.own_prompts(pipeline),
        sampler=partial(family.sampler, pipeline, schedule, prediction_type) if family.sampler else None,
    )


def has_omega_input(network: Any) -> bool:
    """Return whether a network has an omega input (`time_cond_proj_dim`)."""
    return network.config.get("time_cond_proj_dim") is not None


def supports_omega_input(network: Any) -> bool:
    """Return whether a network's class can have an omega input, which full students of that class then get."""
    return "time_cond_proj_dim" in network.config


def with_omega_input(network: Any) -> dict[str, Any]:
    """Return a network's config with an omega input added, for `from_config`.

    diffusers records which keys a config file lacked, and drops those again; Stable Diffusion 1.5's lacks many.
    """
    config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    return {**config, "time_cond_proj_dim": OMEGA_DIM}


def omega_input(network: Any, w: Tensor | None) -> Tensor | None:
    """Return a network's `timestep_cond` for omega (B,) in the network's dtype; None if it has no omega input."""
    if w is None or not has_omega_input(network):
        return None
    return omega_embedding(w, network.config.time_cond_proj_dim).to(dtype_of(network))


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's first parameter that is not quantized. diffusers' `dtype` visits all modules."""
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
