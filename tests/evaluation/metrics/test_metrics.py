"""Metrics with weights, on small random ones in the real files' formats, against libraries and closed forms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcmdistill.diffusion.lpips import perceptual_distance
from lcmdistill.evaluation.metrics.base import ImagePair, Metric, center_square
from lcmdistill.evaluation.metrics.features import (
    MobileNetV2Features,
    ScriptedFeatures,
    kid,
    kid_error,
    kid_metric,
    precision,
)
from lcmdistill.evaluation.metrics.pretrained import fid_metric, fid_to_teacher_metrics, lpips_metric
from lcmdistill.utils.errors import UsageError

CPU = torch.device("cpu")


def image_pair(count: int = 3, side: int = 64) -> ImagePair:
    a, b = (torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    latents = torch.zeros(count, 4, 8, 8)
    return ImagePair(latents, a, latents, b, ("a red apple", "a blue car", "a green tree")[:count])


@pytest.fixture
def alexnet() -> nn.Sequential:
    """torchvision's AlexNet features, layer by layer, with random weights."""
    layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1)]
    layers += [nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for i, layer in enumerate(layers):
        for parameter in layer.parameters():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return nn.Sequential(*layers)


def test_lpips_is_torchmetrics_own(alexnet: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchmetrics.functional.image import lpips

    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{key}": value for key, value in alexnet.state_dict().items()}, path)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: alexnet)
    monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", True, raising=False)
    heads = Path(lpips.__file__).parent / "lpips_models" / "alex.pth"
    on_cpu = torch.load(heads, weights_only=True, map_location="cpu")
    torch.save(on_cpu, tmp_path / "heads.pth")
    theirs = lpips._LPIPS(net="alex", model_path=str(tmp_path / "heads.pth"))
    images = image_pair()
    expected = theirs(images.pixels, images.reference_pixels, normalize=True).view(-1)
    found = lpips_metric(path, CPU).per_image(images).view(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert float(lpips_metric(path, CPU).per_image(images._replace(reference_pixels=images.pixels)).abs().max()) == 0


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1, 2]])
def test_another_file_is_not_alexnet(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="does not hold AlexNet's weights"):
        lpips_metric(tmp_path / "x.pth", CPU)


class Inception(nn.Module):
    """Like the published TorchScript file: classes, or features on request."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = images.float().mean((2, 3)) @ self.weight.T
        if return_features:
            return features
        return features.softmax(1)


def scripted(folder: Path) -> ScriptedFeatures:
    torch.jit.script(Inception()).save(str(folder / "inception.pt"))
    return ScriptedFeatures(folder / "inception.pt", "--inception")


def test_fid_is_the_frechet_distance_of_the_scripted_features(tmp_path: Path):
    network, generator = scripted(tmp_path), torch.Generator().manual_seed(1)
    real = torch.randn(10_000, 6, generator=generator)
    generated = 0.5 * torch.randn(10_000, 6, generator=generator) + 2.0
    found = fid_metric(network, "inception", real, "real").reduce(generated.double())

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.double().mean(0), torch.cov(x.double().T)

    (mean_a, cov_a), (mean_b, cov_b) = moments(generated), moments(real)
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert found == pytest.approx(6 * 4 + 6 * 0.25, rel=0.05)


def test_features_are_requested_from_a_network_with_classes(tmp_path: Path):
    network, images = scripted(tmp_path), torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(network(images), images.float().mean((2, 3)) @ Inception().weight.T)


def test_fid_of_too_few_images_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="FID needs at least 10000 real images, and pets has 9999, too few"):
        fid_metric(scripted(tmp_path), "inception", torch.zeros(9_999, 6), "pets")


def test_a_state_dict_is_not_a_feature_network(tmp_path: Path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"--inception .*x\.pth is not a TorchScript file"):
        ScriptedFeatures(tmp_path / "x.pth", "--inception")


def test_lpips_trains_on_pixels_of_one_channel(alexnet: nn.Sequential, tmp_path: Path):
    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{key}": value for key, value in alexnet.state_dict().items()}, path)
    distance = perceptual_distance(str(path), torch.device("cpu"))
    a, b = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    found = distance(a.requires_grad_(), b)
    found.sum().backward()
    assert found.shape == (2,)
    assert a.grad is not None
    assert a.grad.abs().max() > 0
    enlarged = [nn.functional.interpolate((x.detach() + 1) / 2, size=224, mode="bilinear") for x in (a, b)]
    pixels, reference = (x.expand(-1, 3, -1, -1) for x in enlarged)
    expected = (
        lpips_metric(path, CPU).per_image(image_pair()._replace(pixels=pixels, reference_pixels=reference)).view(-1)
    )
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("name", ["lpips", "fid", "kid"])
def test_networks_run_on_the_device_of_the_run(name: str, alexnet: nn.Sequential, tmp_path: Path) -> None:
    """The meta device stands in for a GPU: a result on it was computed by a network on it, from inputs moved to it."""
    device = torch.device("meta")
    torch.save({f"features.{key}": value for key, value in alexnet.state_dict().items()}, tmp_path / "alexnet.pth")

    def metric() -> Metric:
        if name == "lpips":
            return lpips_metric(tmp_path / "alexnet.pth", device)
        features = MobileNetV2Features().to(device)
        if name == "fid":
            return fid_metric(features, "x", torch.zeros(10_000, 1280), "real")
        return kid_metric(features, "x", torch.zeros(4, 1280), "real")

    values = metric().per_image(image_pair(3, 64))
    assert values.device.type == "meta"
    assert len(values) == 3


def test_only_the_center_of_other_shapes_is_compared_with_square_images() -> None:
    pixels = torch.rand(2, 3, 8, 12)
    assert torch.equal(center_square(pixels), pixels[..., 2:10])
    assert torch.equal(center_square(pixels.mT), pixels.mT[..., 2:10, :])
    assert torch.equal(center_square(pixels[..., :8]), pixels[..., :8])


def precision_recall(features: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    return precision(features, real, k=k), precision(real, features, k=k)


def test_precision_and_recall_of_points_on_a_line() -> None:
    """With k = 1 and points one apart, each ball reaches to its neighbors, and the outermost ones 1 beyond."""
    real = torch.arange(5.0)[:, None]  # covers -1 to 5
    generated = torch.tensor([[-2.0], [-0.5], [2.5], [7.0]])
    # Radii of the generated points by their nearest neighbor: 1.5, 1.5, 3 and 4.5, which cover -3.5 to 1, -.5 to 5.5, 2.5 on.
    assert precision_recall(generated, real, k=1) == (0.5, 1.0)
    assert precision_recall(real, real, k=1) == (1.0, 1.0)
    # A student that makes one image is precise, and recalls only that image.
    collapsed = torch.full((5, 1), 2.0)
    assert precision_recall(collapsed, real, k=1) == (1.0, 0.2)
    assert precision_recall(real + 100, real, k=3) == (0.0, 0.0)


def test_the_standard_error_of_kid_is_that_of_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shift: torch.randn(200, 8, generator=generator) + shift  # noqa: E731
    values, errors = [], []
    for _ in range(60):
        features, real = draw(0.3), draw(0.0)
        values.append(kid(features, real))
        errors.append(kid_error(features, real))
    spread = float(torch.tensor(values).std())
    assert 0.6 * spread < sum(errors) / len(errors) < 2 * spread


def test_fid_to_the_teacher_compares_whole_images_and_patches(tmp_path: Path) -> None:
    network = scripted(tmp_path)
    assert list(fid_to_teacher_metrics(network, "x", 256)) == ["fid_teacher"]
    metrics = fid_to_teacher_metrics(network, "x", 512)
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2, 3, 320, 400, generator=generator)
    changed = reference.clone()
    changed[..., :5, :] = 0.0  # outside of the patch
    pair = ImagePair(reference, changed, reference, reference, ("a", "b"))
    whole, patch = (metrics[name].per_image(pair).chunk(2, dim=1) for name in ("fid_teacher", "patch_fid_teacher"))
    assert not torch.equal(*whole)
    assert torch.equal(*patch)
    features = torch.randn(50, 6, generator=generator).double()
    for metric in metrics.values():
        assert metric.min_images == 10_000
        assert metric.reduce(torch.cat([features, features], 1)) == pytest.approx(0.0, abs=1e-6)
        assert metric.reduce(torch.cat([features + 1.0, features], 1)) == pytest.approx(6.0, rel=1e-3)
