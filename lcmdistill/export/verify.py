"""How far an export is from what it was made of: fixed inputs for every part of a pipeline, bounds, the comparison.

Everything is computed in fp32 on the CPU. Shapes: B batch, C channels, h w latent size, L tokens, D width of the prompt's
embedding, P of the pooled one, W of omega's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import omega_embedding
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.utils.errors import RunError

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""of the largest difference that passes, as a part of the reference's largest magnitude; half precisions round the weights
(small models are off by up to .002 and .02), a weight in the wrong place is off by about 1"""

Outputs = Mapping[str, Sequence[Tensor]]
"part of a pipeline -> what it gives on fixed inputs"

ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"the inputs that diffusers' networks take inside `added_cond_kwargs`"


def network_inputs(
    network: Any, guidance_scale: float, *, batch: int = 2, size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Fixed inputs of a denoising network under the names of its own arguments, those of ADDED among them.

    The one place that knows what a network takes. sample: (B, C, h, w), timestep: (B,), encoder_hidden_states: (B, L, D);
    timestep_cond: (B, W) if it takes omega; text_embeds: (B, P) and time_ids: (B, 6) of SDXL; resolution: (B, 2) and
    aspect_ratio: (B, 1) of PixArt; class_labels: (B,). guidance_scale: diffusers' convention, omega + 1; size: of the latents,
    by default the smallest square that it halves at each of its levels.
    """
    config, rng = network.config, torch.Generator().manual_seed(batch)
    height, width = size or (smallest_side(network),) * 2
    inputs = {
        "sample": torch.randn(batch, config.in_channels, height, width, generator=rng),
        "timestep": torch.tensor([999, 259, 19])[torch.arange(batch) % 3],
    }
    embeds = config.get("caption_channels") or config.get("cross_attention_dim")
    if embeds:  # in pixel space there is no prompt
        inputs["encoder_hidden_states"] = torch.randn(batch, 77, embeds, generator=rng)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = torch.randn(batch, pooled, generator=rng)
        inputs["time_ids"] = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(batch, 1)
    if getattr(network, "use_additional_conditions", False):
        inputs["resolution"] = torch.tensor([[1024.0, 1024.0]]).repeat(batch, 1)
        inputs["aspect_ratio"] = torch.ones(batch, 1)
    if config.get("num_class_embeds"):
        inputs["class_labels"] = torch.arange(batch) % config.num_class_embeds
    if has_omega_input(network):
        w = torch.full((batch,), guidance_scale - 1.0)
        inputs["timestep_cond"] = omega_embedding(w, config.time_cond_proj_dim)
    return inputs


def smallest_side(network: Any) -> int:
    """The side of the smallest latents, in pixels of theirs, that leaves a U-Net's innermost level more than one."""
    return 2 ** len(network.config.get("block_out_channels", (0, 0)))


@torch.no_grad()
def network_output(network: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a network gives on `network_inputs`, (B, C, h, w)."""
    added: dict[str, Any] = {name: value for name, value in inputs.items() if name in ADDED}
    plain = {name: value for name, value in inputs.items() if name not in ADDED}
    if type(network).__name__.startswith("PixArt"):  # which asks for the dict's keys even where it uses none
        added = {"resolution": None, "aspect_ratio": None, **added}
        plain["hidden_states"] = plain.pop("sample")
    told = {"added_cond_kwargs": added} if added else {}
    return network.float().eval()(**plain, **told, return_dict=False)[0]


def network_outputs(network: Any, guidance_scale: float) -> dict[str, list[Tensor]]:
    """Outputs of the network alone: all that a LoRA changes."""
    return {"network": [network_output(network, network_inputs(network, guidance_scale))]}


def pipeline_outputs(pipeline: Any, guidance_scale: float) -> dict[str, list[Tensor]]:
    """Outputs of a pipeline's network, its VAE both ways and its text encoders."""
    outputs = network_outputs(network_of(pipeline), guidance_scale)
    if "vae" in pipeline.components:
        outputs["VAE"] = _vae_both_ways(pipeline.vae)
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            outputs[name] = _text_encoding(part)
    return outputs


@torch.no_grad()
def _vae_both_ways(vae: Any) -> list[Tensor]:
    vae, rng, side = vae.float().eval(), torch.Generator().manual_seed(0), 2 * 2 ** len(vae.config.block_out_channels)
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=rng)
    pixels = torch.rand(1, vae.config.in_channels, side, side, generator=rng) * 2 - 1
    return [vae.decode(latents, return_dict=False)[0], vae.encode(pixels, return_dict=False)[0].mean]


@torch.no_grad()
def _text_encoding(encoder: Any) -> list[Tensor]:
    config = encoder.config
    shape = (2, getattr(config, "max_position_embeddings", 77))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    output = encoder.float().eval()(ids)
    return [value for value in (output.last_hidden_state, output.get("text_embeds")) if value is not None]


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of some tensors, each as a part of the largest value that is expected of it."""
    pairs = zip(got, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def check_close(got: Outputs, expected: Outputs, bound: float, what: object) -> str:
    """A sentence with the largest difference, as a part of the largest value. Raises RunError above the bound.

    what: the file or folder that the outputs are of.
    """
    off = {part: difference(got[part], values) for part, values in expected.items()}
    for part, value in off.items():
        if not value <= bound:  # a NaN is above any bound
            raise RunError(
                f"{what} does not give the trained model's output: its {part} is off by {value:.2g}, allowed is {bound:.2g}"
            )
    return f"{what}: reloaded, largest difference {max(off.values()):.2g} of the largest value (allowed {bound:.2g})"
