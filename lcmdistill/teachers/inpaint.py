"""Inpainting: the U-Net also sees a mask and the image without the masked part, and fills that part in.

Shapes: B batch, C latent channels, h w latent size, H W pixels. Such a U-Net takes C + 1 + C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lcmdistill.teachers.family import SampleInfo, SingleFileLayout, TeacherFamily
from lcmdistill.teachers.sd import SD1, SD2, STABLE_DIFFUSION, check_input_channels
from lcmdistill.teachers.sdxl import SDXL, STABLE_DIFFUSION_XL, check_sdxl

if TYPE_CHECKING:
    from torch import Tensor

    from lcmdistill.diffusion.types import Conditioning

ALL_MASKED = 0.25
"the share of samples that are masked entirely (model card of Stable Diffusion Inpainting); the others have one rectangle"

SMALLEST = 0.125
"the shortest side of a rectangle, as a share of the image's side"


def _inpainting(
    plain: TeacherFamily, *, key: str, pipeline_class: str, layouts: tuple[SingleFileLayout, ...], check: Any
) -> TeacherFamily:
    """Return the family whose U-Net is a plain family's with a mask and masked latents as further input channels."""
    by_key = {layout.key: layout for layout in layouts}

    def call(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
        import torch

        return plain.call(unet, torch.cat([z, c["mask"].to(z.dtype), c["masked"].to(z.dtype)], dim=1), t, c, w)

    def condition(samples: SampleInfo) -> Conditioning:
        return plain.condition(samples) | mask_condition(samples)

    def layout_of(config: Mapping[str, Any]) -> SingleFileLayout:
        assert plain.layout_of is not None
        return by_key[plain.layout_of(config).key]

    return replace(
        plain,
        key=key,
        title=f"{plain.title} inpainting",
        pipeline_classes=(pipeline_class,),
        takes_mask=True,
        input_channels=9,
        call=call,
        condition=condition,
        condition_is_random=True,
        extra_call_kwargs=_mask_kwargs,
        check=check,
        student_pipeline_class=lambda has_omega_input, has_options: None,
        layouts=layouts,
        layout_of=layout_of,
        onnx_classes={pipeline_class: f"ORT{pipeline_class}"},
        aliases={},
        describe=lambda pipeline_class, config: f"{layout_of(config).title} inpainting",
    )


def _mask_kwargs(count: int, height: int, width: int, image_and_mask: tuple[Any, Any] | None) -> dict[str, Any]:
    """Return the image and the mask for each sample; by default everything is masked and the prompt decides."""
    import torch

    image, mask = image_and_mask or (torch.zeros(3, height, width), torch.ones(1, height, width))
    return {"image": [image] * count, "mask_image": [mask] * count, "strength": 1.0}


def mask_condition(samples: SampleInfo) -> Conditioning:
    """Return a random mask per sample, 1 where it hides, (B, 1, h, w), and the masked image's latents (B, C, h, w).

    Both are fp16, as in the cache. diffusers' pipelines compute them from an image and a mask in the same way.
    """
    import torch

    from lcmdistill.diffusion.types import Conditioning

    pixels = samples.pixels()
    mask = torch.stack([draw_mask(pixels.shape[2], pixels.shape[3], seed) for seed in samples.seeds]).to(pixels.device)
    latents = samples.encode(pixels * (1.0 - mask))
    small = torch.nn.functional.interpolate(mask, size=latents.shape[2:])
    return Conditioning({"mask": small.half(), "masked": latents.half()})


def draw_mask(height: int, width: int, seed: int) -> Tensor:
    """Draw a mask (1, H, W) fp32 from a seed: all ones, or a rectangle of ones."""
    import torch

    everything, *draws = torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()
    if everything < ALL_MASKED:
        return torch.ones(1, height, width)
    rows, columns = (
        max(1, round(n * (SMALLEST + (1 - SMALLEST) * u))) for n, u in ((height, draws[0]), (width, draws[1]))
    )
    top, left = round((height - rows) * draws[2]), round((width - columns) * draws[3])
    mask = torch.zeros(1, height, width)
    mask[:, top : top + rows, left : left + columns] = 1.0
    return mask


def _with_architecture(layout: SingleFileLayout, name: str) -> SingleFileLayout:
    """Return a layout whose inpainting models have a ModelSpec architecture of their own, and predict epsilon."""
    return replace(layout, architectures=dict.fromkeys(layout.architectures, name), default_prediction="epsilon")


STABLE_DIFFUSION_INPAINT = _inpainting(
    STABLE_DIFFUSION,
    key="sd-inpaint",
    pipeline_class="StableDiffusionInpaintPipeline",
    layouts=(
        _with_architecture(SD1, "stable-diffusion-v1-inpainting"),
        _with_architecture(SD2, "stable-diffusion-v2-inpainting"),
    ),
    check=partial(check_input_channels, takes_mask=True),
)

STABLE_DIFFUSION_XL_INPAINT = _inpainting(
    STABLE_DIFFUSION_XL,
    key="sdxl-inpaint",
    pipeline_class="StableDiffusionXLInpaintPipeline",
    layouts=(SDXL,),  # ModelSpec has no inpainting name for SDXL
    check=partial(check_sdxl, takes_mask=True),
)
