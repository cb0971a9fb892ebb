"""ComfyUI's rule of sampling, written out: its table of sigmas, what it takes a file for, and one step of its `lcm` sampler.

ComfyUI works with x = z / alpha and sigma_k = sigma / alpha of the variance-preserving pair. The rule is that of version 0.8.0
(`model_sampling.py`, `supported_models.py`, `samplers.py`); `tests/slow/clients` compares it with a checkout.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import to_x0_eps
from lcmdistill.export.sampling_facts import SamplingFacts
from lcmdistill.export.verify import difference, network_inputs, network_output
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.errors import RunError

LAST_ABAR = 4.8973451890853435e-08
"what ComfyUI puts for abar = 0 at the last time of zero-terminal SNR"

TIMES = (999, 499)
"the two times that a verification samples at"

SAMPLING_BOUND = 25.0
"how much larger than the bound of one output the difference after two steps may be: x0 divides it by alpha, 1/15 at t = 999"

LARGEST_BOUND = 1.0
"the largest difference allowed; a wrong rule is off by several times the largest value"


def comfyui_sigmas(*, zero_snr: bool = False) -> Tensor:
    """Return ComfyUI's sigma of each time, (1000,) fp32: Stable Diffusion's betas, rescaled for zero-terminal SNR."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    if zero_snr:
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        abar[-1] = LAST_ABAR
    return ((1 - abar) / abar).sqrt().float()


def sgm_uniform(sigmas: Tensor, steps: int) -> Tensor:
    """Return the sigmas of the scheduler `sgm_uniform`, (steps + 1,): evenly spaced times, logarithms interpolated."""
    times = torch.linspace(len(sigmas) - 1, 0, steps + 1)[:-1]
    low, high = times.floor().long(), times.ceil().long()
    logs = sigmas.log()
    between = ((1 - times.frac()) * logs[low] + times.frac() * logs[high]).exp()
    return torch.cat([between, torch.zeros(1)])


def time_of(sigmas: Tensor, sigma: Tensor) -> Tensor:
    """Return the time that ComfyUI passes to a network for a sigma: the nearest of the table."""
    return (sigma.log() - sigmas.log()).abs().argmin()


def comfyui_detects(layout: str, keys: Collection[str], last_norm: Tensor | None = None) -> tuple[str, bool]:
    """Return the prediction type and zero-terminal SNR that ComfyUI takes a checkpoint for, without a node.

    Args:
        layout: The key of the single-file layout.
        keys: The keys of the file.
        last_norm: `output_blocks.11.1.transformer_blocks.0.norm1.bias`, by which it recognizes SD 2's v-prediction.
    """
    if layout == "sdxl":
        is_v = "v_pred" in keys
        return ("v_prediction" if is_v else "epsilon"), is_v and "ztsnr" in keys
    is_v = layout == "sd2" and last_norm is not None and float(last_norm.float().std(unbiased=False)) > 0.09
    return ("v_prediction" if is_v else "epsilon"), False


def denoised(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Return ComfyUI's estimate of x0 from a network's output.

    Args:
        output: The raw output, (B, C, h, w).
        x: z / alpha, (B, C, h, w).
        sigma: sigma / alpha, a scalar.
        prediction_type: "epsilon" or "v_prediction".
    """
    if prediction_type == "v_prediction":
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
    return x - output * sigma


def _network(pipeline: Any, guidance_scale: float) -> tuple[Callable[[Tensor, int], Tensor], Tensor, Tensor]:
    """Return (z, t) -> raw output on fixed conditions, and the noise of two steps, (B, C, h, w) each."""
    family, network = family_of(pipeline), network_of(pipeline)
    inputs = network_inputs(family, network, guidance_scale)
    channels = network.config.out_channels
    rest = inputs["sample"][:, channels:]  # an inpainting network's mask and masked image

    def call(z: Tensor, t: int) -> Tensor:
        times = torch.full((len(z),), t)
        return network_output(family, network, {**inputs, "sample": torch.cat([z, rest], 1), "timestep": times})

    noise = torch.randn(2, *inputs["sample"][:, :channels].shape, generator=torch.Generator().manual_seed(7))
    return call, noise[0], noise[1]


def sample_as_trained(pipeline: Any, guidance_scale: float) -> Tensor:
    """Return a student's latents after two LCM steps on its own schedule, (B, C, h, w)."""
    family: TeacherFamily = family_of(pipeline)
    schedule, prediction_type = family.denoiser(pipeline.scheduler.config)
    call, z, noise = _network(pipeline, guidance_scale)
    x0 = z
    for i, time in enumerate(TIMES):
        t = torch.full((len(z),), time)
        z = z if i == 0 else schedule.diffuse(x0, noise, t)
        x0 = to_x0_eps(call(z, time), z, schedule.alpha(t), schedule.sigma(t), prediction_type).x0
    return x0


def sample_as_comfyui(pipeline: Any, guidance_scale: float, prediction_type: str, zero_snr: bool) -> Tensor:
    """Return the latents after the same two steps by ComfyUI's rule, (B, C, h, w).

    Args:
        pipeline: The pipeline as it was read from the file.
        guidance_scale: In diffusers' convention, omega + 1.
        prediction_type: What ComfyUI takes the network for, with the node that the instructions name.
        zero_snr: Whether its sigmas are those of zero-terminal SNR.
    """
    call, first, noise = _network(pipeline, guidance_scale)
    sigmas = comfyui_sigmas(zero_snr=zero_snr)
    x, x0 = first * (1 + sigmas[TIMES[0]] ** 2).sqrt(), first
    for i, time in enumerate(TIMES):
        sigma = sigmas[time]
        x = x if i == 0 else x0 + noise * sigma
        x0 = denoised(call(x / (sigma**2 + 1).sqrt(), int(time_of(sigmas, sigma))), x, sigma, prediction_type)
    return x0


def check_sampling(
    pipeline: Any, guidance_scale: float, expected: Tensor, facts: SamplingFacts, keys: Collection[str], bound: float
) -> str:
    """Return a sentence with the difference of two steps in ComfyUI, set up as the instructions say.

    Args:
        pipeline: The pipeline as it was read from the file.
        guidance_scale: In diffusers' convention, omega + 1.
        expected: The student's latents, from `sample_as_trained`.
        facts: How the student is sampled, with Stable Diffusion's betas.
        keys: The keys of the file.
        bound: The bound of one output's difference.

    Raises:
        RunError: ComfyUI would generate other images.
    """
    if facts.has_prediction_keys:
        prediction_type, zero_snr = comfyui_detects(facts.layout, keys)
    else:  # set in a node, wherever it is not ComfyUI's default
        prediction_type, zero_snr = facts.prediction_type, facts.zero_snr
    value = difference([sample_as_comfyui(pipeline, guidance_scale, prediction_type, zero_snr)], [expected])
    allowed = min(max(SAMPLING_BOUND * bound, 1e-3), LARGEST_BOUND)
    if value <= allowed:
        return f"two steps by ComfyUI's rule: largest difference {value:.2g} (allowed {allowed:.2g})"
    raise RunError(
        f"two steps by ComfyUI's rule are off by {value:.2g}, allowed is {allowed:.2g}: the file's prediction type or schedule "
        "is not the student's; this is a fault of lcmdistill, please report it"
    )
