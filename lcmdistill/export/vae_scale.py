"""The scale of a single file's latents: programs assume their family's, and the weights of the VAE absorb another one.

A network is trained on z = (m - shift) * scale, with the VAE's latents m. Programs do not read scale and shift from a file.
With programs' scale' and shift', the first layer of the decoder gets m = a m' + b, and the last one of the encoder gives m'.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcmdistill.teachers.family import SingleFileLayout
from lcmdistill.utils.errors import UsageError

VAE = "first_stage_model."

ROUNDING = 1e-6
"the difference of an offset that is none"


def vae_scale(config: Any) -> tuple[float, float]:
    """Return the scale and the shift of a VAE's latents, from its config."""
    return config.scaling_factor, config.get("shift_factor") or 0.0


def is_absorbed(config: Any, layout: SingleFileLayout) -> bool:
    """Return whether a VAE's scale is not the one that programs assume for its file."""
    return vae_scale(config) != (layout.latent_scale, layout.latent_shift)


def absorbed_note(config: Any, layout: SingleFileLayout) -> str:
    """Return a clause on the scale that a file's weights absorb, or ""."""
    if not is_absorbed(config, layout):
        return ""
    scale, shift = vae_scale(config)
    and_shift = f" and shift of {shift:g}" if shift else ""
    return (
        f"the VAE's scaling factor of {scale:g}{and_shift} is contained in its weights, so that programs decode it with "
        f"{_words(layout)}"
    )


def _words(layout: SingleFileLayout) -> str:
    return f"{layout.latent_scale:g}{f' and the shift {layout.latent_shift:g}' if layout.latent_shift else ''}"


def absorb_scale(tensors: Mapping[str, Tensor], config: Any, layout: SingleFileLayout) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with a VAE that programs decode as it was trained.

    Args:
        tensors: The tensors under their original keys.
        config: The VAE's config, with its own scale and shift.
        layout: The layout of the file.

    Raises:
        UsageError: A shift differs, and the decoder begins with a padded convolution: padding cannot be shifted.
    """
    if not is_absorbed(config, layout):
        return dict(tensors)
    scale, shift = vae_scale(config)
    a = layout.latent_scale / scale
    b = shift - a * layout.latent_shift
    has_post, has_quant = f"{VAE}post_quant_conv.weight" in tensors, f"{VAE}quant_conv.weight" in tensors
    if not has_post and abs(b) > ROUNDING:
        raise UsageError(
            f"the teacher's VAE has a scaling factor of {scale:g} and a shift of {shift:g}; programs decode single files with "
            f"{_words(layout)}, and its weights cannot make up for it; use --format pipeline"
        )
    first = f"{VAE}{'post_quant_conv' if has_post else 'decoder.conv_in'}"
    last = f"{VAE}{'quant_conv' if has_quant else 'encoder.conv_out'}"
    weight, bias = tensors[f"{first}.weight"], tensors[f"{first}.bias"]
    changed = {f"{first}.weight": weight * a, f"{first}.bias": bias + b * weight.sum((1, 2, 3)) if has_post else bias}
    # m' = (m - b) / a; the second half of the moments are logarithms of variances.
    factors = torch.ones(2, config.latent_channels)
    offsets = torch.zeros(2, config.latent_channels)
    factors[0], offsets[0], offsets[1] = 1 / a, -b / a, -2 * math.log(abs(a))
    factor, offset = (each.flatten().to(bias) for each in (factors, offsets))
    weight, bias = tensors[f"{last}.weight"], tensors[f"{last}.bias"]
    changed |= {f"{last}.weight": weight * factor[:, None, None, None], f"{last}.bias": bias * factor + offset}
    return {**tensors, **changed}
