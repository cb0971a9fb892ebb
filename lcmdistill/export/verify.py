"""Compare an export with the trained student: fixed inputs for every part of a pipeline, bounds, the comparison.

Everything is computed in fp32 on the CPU. Shapes: B batch, C channels, h w latent size, L tokens, D width of the prompt's
embedding, P of the pooled one, W of omega's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import omega_embedding
from lcmdistill.export.vae_scale import vae_scale
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.errors import RunError

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest difference allowed, relative to the reference's largest magnitude. Half precision rounds the weights: small
models differ by up to .002 (fp16) and .02 (bf16). A weight in the wrong place causes a difference of about 1."""

Outputs = Mapping[str, Sequence[Tensor]]
"part of a pipeline -> its outputs on fixed inputs"


def network_inputs(
    family: TeacherFamily,
    network: Any,
    guidance_scale: float,
    *,
    batch: int = 2,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return fixed inputs of a denoising network, under the names of its own arguments and of the family's added inputs.

    These are `sample` (B, C, h, w), `timestep` (B,), the family's conditioning inputs, and `timestep_cond` (B, W) if the
    network has an omega input.

    Args:
        family: The network's family.
        network: A teacher's or a student's network.
        guidance_scale: In diffusers' convention, omega + 1.
        batch: The batch size.
        size: The latents' height and width; by default the smallest square that the network can halve at each level.
    """
    config, rng = network.config, torch.Generator().manual_seed(batch)
    height, width = size or (smallest_side(network),) * 2
    inputs = {
        "sample": torch.randn(batch, config.in_channels // family.token_side**2, height, width, generator=rng),
        "timestep": torch.tensor([999, 259, 19])[torch.arange(batch) % 3],
        **family.example_inputs(network, rng, batch),
    }
    if has_omega_input(network):
        w = torch.full((batch,), guidance_scale - 1.0)
        inputs["timestep_cond"] = omega_embedding(w, config.time_cond_proj_dim)
    return inputs


def smallest_side(network: Any) -> int:
    """Return the side of the smallest latents that leave more than one element per axis at a U-Net's innermost level."""
    return 2 ** len(network.config.get("block_out_channels", (0, 0)))


@torch.no_grad()
def network_output(family: TeacherFamily, network: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a network's output on `network_inputs`, (B, C, h, w)."""
    return network.float().eval()(**family.network_kwargs(family, network, inputs), return_dict=False)[0]


def network_outputs(family: TeacherFamily, network: Any, guidance_scale: float) -> dict[str, list[Tensor]]:
    """Return the outputs of the network only, the one part that a LoRA changes."""
    return {"network": [network_output(family, network, network_inputs(family, network, guidance_scale))]}


def pipeline_outputs(pipeline: Any, guidance_scale: float) -> dict[str, list[Tensor]]:
    """Return the outputs of a pipeline's network, VAE (both directions) and text encoders."""
    outputs = network_outputs(family_of(pipeline), network_of(pipeline), guidance_scale)
    if "vae" in pipeline.components:
        outputs["VAE"] = _vae_both_ways(pipeline)
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            outputs[name] = _text_encoding(part)
    return outputs


@torch.no_grad()
def _vae_both_ways(pipeline: Any) -> list[Tensor]:
    """Return decoded latents, and the moments of encoded pixels, in the scale that the network sees."""
    family, vae, rng = family_of(pipeline), pipeline.vae.float().eval(), torch.Generator().manual_seed(0)
    side = 4 * family.vae_factor(vae.config)
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=rng)
    pixels = torch.rand(1, vae.config.in_channels, side, side, generator=rng) * 2 - 1
    scale, shift = vae_scale(vae.config)
    posterior = family.vae(pipeline).encode(pixels).latent_dist
    log_std = (posterior.std.clamp(min=1e-12) * abs(scale)).log()
    return [vae.decode(latents / scale + shift, return_dict=False)[0], (posterior.mean - shift) * scale, log_std]


@torch.no_grad()
def _text_encoding(encoder: Any) -> list[Tensor]:
    config = encoder.config
    shape = (2, min(getattr(config, "max_position_embeddings", 77), 77))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    output = encoder.float().eval()(ids)
    return [value for value in (output.last_hidden_state, output.get("text_embeds")) if value is not None]


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference between tensors, each relative to the largest expected value."""
    pairs = zip(got, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def check_close(got: Outputs, expected: Outputs, bound: float, what: object) -> str:
    """Return a sentence with the largest relative difference.

    Args:
        got: The outputs of the export.
        expected: The outputs of the trained student.
        bound: The largest difference allowed, relative to the largest expected value.
        what: The exported file or folder, for messages.

    Raises:
        RunError: A difference is above the bound.
    """
    differences = {part: difference(got[part], values) for part, values in expected.items()}
    for part, value in differences.items():
        if not value <= bound:  # a NaN is above any bound
            raise RunError(
                f"{what} does not reproduce the trained model: its {part} differs by {value:.2g} (allowed {bound:.2g})"
            )
    return f"{what}: reloaded, largest difference {max(differences.values()):.2g} of the largest value (allowed {bound:.2g})"
