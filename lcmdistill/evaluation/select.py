"""Which metrics an evaluation computes, and the real images that some of them need."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.bundled import BundledShards
from lcmdistill.data.sources.registry import make_source
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.evaluation.metrics.base import Metric, check_count
from lcmdistill.evaluation.metrics.basic import BASIC_METRICS
from lcmdistill.evaluation.metrics.features import (
    MIN_KID_IMAGES,
    MobileNetV2Features,
    ScriptedFeatures,
    features_of,
    has_mobilenet,
    kid_metric,
    kid_to_teacher_metric,
)
from lcmdistill.evaluation.metrics.pretrained import FID_IMAGES, clip_metric, fid_metric, lpips_metric
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.redact import public_word, redact_word

logger = logging.getLogger(__name__)


def select_metrics(
    run: EvaluatedRun, options: EvaluationOptions, count: int, device: torch.device
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Return the metrics to compute, and everything that decides their numbers except their code.

    Args:
        run: The run to evaluate.
        options: The options, whose `real` is resolved by `real_source`.
        count: The number of images per sweep point.
        device: The device that the metrics' networks run on.

    Raises:
        UsageError: A requested metric needs more images, or real images that the run does not have.
    """
    metrics = {name: metric for name, metric in BASIC_METRICS.items() if count >= metric.min_images}
    files = [options.features, options.inception, options.lpips]
    key: dict[str, Any] = {"files": [fingerprint([path]) if path and path.is_file() else None for path in files]}
    key |= {"models": [options.clip, options.scorer]}
    network = None
    if options.features is not None:
        network = (ScriptedFeatures(options.features, "--features").to(device), options.features.stem)
    elif has_mobilenet():
        network = (MobileNetV2Features().to(device), "MobileNetV2")
    computes_kid = options.features is not None or count >= MIN_KID_IMAGES
    if network and computes_kid:
        metrics["kid_teacher"] = kid_to_teacher_metric(*network)
    if options.real and network and computes_kid:
        real = real_images(options.real, run.config.data.resolution, 2 * count)
        name = f"{len(real)} real images of {public_word(options.real)}"
        metrics["kid"] = kid_metric(*network, features_of(network[0], real), name)
        key["real"] = [options.real, len(real), digest(real.mean((1, 2, 3)).tolist())]
    if options.inception is not None:
        metrics["fid"] = _fid(run, options.inception, options.real, count, device)
    if options.clip is not None:
        metrics["clip"] = clip_metric(options.clip, device)
    if options.lpips is not None:
        metrics["lpips"] = lpips_metric(options.lpips, device)
    if options.scorer is not None:
        metrics["score"] = clip_metric(options.scorer, device, scorer=True)
    for metric in metrics.values():
        check_count(metric, count)
    return metrics, key


def _fid(run: EvaluatedRun, inception: Path, source: str | None, count: int, device: torch.device) -> Metric:
    if count < FID_IMAGES:
        raise UsageError(
            f"--inception: FID needs at least {FID_IMAGES} images because its bias dominates below, and --num-images is "
            f"{count}; pass --num-images {FID_IMAGES}, or use KID"
        )
    if source is None:
        raise UsageError("--inception: FID needs real images, and the run has none; specify them with --real")
    network = ScriptedFeatures(inception, "--inception").to(device)
    real = real_images(source, run.config.data.resolution, max(count, FID_IMAGES))
    return fid_metric(network, inception.stem, features_of(network, real), public_word(source))


def fingerprint(files: Sequence[Path]) -> str:
    """Return a hash of the files' contents."""
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "blake2b").digest())
    return total.hexdigest()


def real_source(runs: Sequence[EvaluatedRun], options: EvaluationOptions) -> str | None:
    """Return the source of real images for all runs, or None: --real, or a data source that the prompts belong to.

    The prompts of an evaluation are held out, so they belong to a run's own images only where the teacher comes with both.
    """
    if options.real is not None:
        return options.real
    words = [word for run in runs for word in run.config.data.sources if _holds_images(word)]
    bundled = next((word for word in words if word == BundledShards.kind), None)
    if words and (bundled is None or options.prompts is not None):
        logger.info(
            f"no KID to the images of {redact_word(words[0])}: the prompts are not their captions; pass --real with images "
            "that belong to --prompts"
        )
        return None
    return bundled


def _holds_images(word: str) -> bool:
    """Return whether a data source still holds local images. Nothing is downloaded and no command is run for this."""
    try:
        source = make_source(word)
        return not (source.is_remote or source.is_generated)
    except UsageError:
        return False


def real_images(source: str, resolution: int, count: int) -> Tensor:
    """Return real images in [0, 1], (at most count, 3, H, W), spread evenly over a source or over its beginning.

    Raises:
        UsageError: The source does not exist or holds no images.
    """
    data = DataConfig(resolution=resolution)
    try:
        members = list(make_source(source).members(32 * count))
    except UsageError as error:
        message = (
            str(error).replace("--data", "--real").replace("tiny, or teacher to train without a data set", "or tiny")
        )
        raise UsageError(message) from error
    stride = max(1, len(members) // count)
    outcomes = (check_sample(replace(member, caption="real"), data, 0, i) for i, member in enumerate(members[::stride]))
    pixels = list(islice((o.pixels for o in outcomes if isinstance(o, Sample) and o.pixels is not None), count))
    if len(pixels) < 2:
        raise UsageError(f"--real {source} holds no images; specify an image folder or shards")
    return (torch.stack(pixels) + 1) / 2
