"""LPIPS on AlexNet (Zhang et al. 2018, arXiv:1801.03924), from local files only."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lcmdistill.diffusion.losses import LossFunction
from lcmdistill.utils.errors import UsageError


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018): two batches of images in [0, 1], (B, 3, H, W) -> (B,).

    The backbone's weights are torchvision's file and the heads' are part of torchmetrics. torchmetrics' own class needs
    torchvision and downloads the backbone.

    Raises:
        UsageError: The file does not hold AlexNet's weights.
    """

    def __init__(self, path: Path, option: str = "--lpips") -> None:
        super().__init__()
        widths, kernels, strides = (64, 192, 384, 256, 256), (11, 5, 3, 3, 3), (4, 1, 1, 1, 1)
        layers: list[nn.Module] = []
        channels = 3
        for i, (width, kernel, stride) in enumerate(zip(widths, kernels, strides, strict=True)):
            layers += [nn.MaxPool2d(3, 2)] if i in (1, 2) else []
            layers += [nn.Conv2d(channels, width, kernel, stride, 2 if i < 2 else 1), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.load_state_dict({**_alexnet(path, self.features, option), **_heads()})
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair of images."""
        distances = []
        x = torch.cat([a, b])
        x = (2 * x - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        head = iter(self.heads)
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                features_a, features_b = (x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt()).chunk(2)
                distances.append(next(head)((features_a - features_b).square()).mean((1, 2, 3)))
        return torch.stack(distances).sum(0)


def _alexnet(path: Path, features: nn.Module, option: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"{option} {path} does not exist; pass torchvision's file alexnet-owt-7be5be79.pth")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        backbone = {key: value for key, value in state.items() if key.startswith("features.")}
        features.load_state_dict({key.removeprefix("features."): value for key, value in backbone.items()})
    except Exception as error:  # a file that is not a pickle raises nearly anything
        raise UsageError(
            f"{option} {path} does not hold AlexNet's weights; pass torchvision's file alexnet-owt-7be5be79.pth"
        ) from error
    return backbone


def _heads() -> dict[str, Tensor]:
    import torchmetrics

    path = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")
    return {f"heads.{i}.weight": state[f"lin{i}.model.1.weight"] for i in range(5)}


@cache
def perceptual_distance(weights: str, device: torch.device) -> LossFunction:
    """Return LPIPS between two batches of pixels in [-1, 1], each (B, 1 or 3, H, W), as (B,). Loaded once per device.

    Small images are enlarged to 224 px, as in Consistency Models (Song et al. 2023, app. C). Raises UsageError as Lpips.
    """
    network = Lpips(Path(weights).expanduser(), "objective.lpips_weights").to(device)

    def prepare(pixels: Tensor) -> Tensor:
        side, images = max(pixels.shape[-1], 224), (pixels.float().expand(-1, 3, -1, -1) + 1) / 2
        return nn.functional.interpolate(images, size=(side, side), mode="bilinear")

    return lambda a, b: network(prepare(a), prepare(b))
