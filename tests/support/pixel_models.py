"""Small random UNet2DModels in the layouts of teachers in pixel space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers

from tests.support.teachers import fill

library: Any = diffusers  # whose annotations are narrower than what it takes

LABELS = ("coat", "Ankle boot", "bag")


def build_pixel(
    folder: Path, labels: Sequence[str] = LABELS, *, channels: int = 1, vp: bool = False, **unet_options: Any
) -> Path:
    """A teacher of 8 px: EDM's denoiser or a VP one; class-conditional, with a class of no class, if it has labels."""
    own = {"out_channels": channels, "num_class_embeds": len(labels) + 1 if labels else None}
    unet = library.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        **{**own, **unet_options},
    )
    fill(unet, seed=0)
    if labels:
        unet.register_to_config(_labels=list(labels))
    scheduler = library.DDPMScheduler() if vp else library.EDMEulerScheduler()
    if not vp:
        scheduler.register_to_config(_timestep_scale=1000.0)
    library.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder
