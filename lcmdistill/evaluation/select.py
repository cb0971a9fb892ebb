"""Which metrics an evaluation computes, and the real images that some of them need."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    teacher_set_metrics,
)
from lcmdistill.evaluation.metrics.pretrained import (
    FID_IMAGES,
    fid_metric,
    fid_to_teacher_metrics,
    lpips_metric,
)
from lcmdistill.evaluation.metrics.published_fid import (
    central_patch,
    published_fid_metrics,
    real_features,
    whole_image,
)
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions
from lcmdistill.evaluation.prompts import PromptChoice
from lcmdistill.evaluation.protocols import PublishedRun
from lcmdistill.evaluation.scorers.base import scorer_metric
from lcmdistill.evaluation.scorers.registry import SCORERS
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.redact import public_word, redact_word

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The metrics of an evaluation.

    Attributes:
        metrics: The metrics to compute, in their order on the page.
        key: Everything that decides their numbers, except their code.
        notes: Sentences about metrics that are left out.
    """

    metrics: dict[str, Metric]
    key: dict[str, Any]
    notes: tuple[str, ...] = ()


def select_metrics(
    run: EvaluatedRun, options: EvaluationOptions, real: Sequence[str], count: int, device: torch.device
) -> Selection:
    """Select the metrics to compute.

    Args:
        run: The run to evaluate.
        options: The options.
        real: The sources of real images that belong to the prompts; see `real_sources`.
        count: The number of images per sweep point.
        device: The device that the metrics' networks run on.

    Raises:
        UsageError: A requested metric needs more images, or real images that the run does not have.
    """
    metrics = {name: metric for name, metric in BASIC_METRICS.items() if count >= metric.min_images}
    files = [options.features, options.inception, options.lpips]
    key: dict[str, Any] = {"files": [fingerprint([path]) if path and path.is_file() else None for path in files]}
    key |= {"scorers": {name: [word, _file_sizes(Path(word).expanduser())] for name, word in options.scorers.items()}}
    notes: list[str] = []
    network = None
    if options.features is not None:
        network = (ScriptedFeatures(options.features, "--features").to(device), options.features.stem)
    elif has_mobilenet():
        network = (MobileNetV2Features().to(device), "MobileNetV2")
    if network is not None:
        of_teacher = teacher_set_metrics(*network)
        least = of_teacher["kid_teacher"].min_images
        if count >= least or options.features is not None:
            metrics = {**of_teacher, **metrics}  # what the teacher would make of the same prompts comes first
            if real:
                _add_kid(metrics, key, notes, network, real, run, count, is_requested=options.real is not None)
        elif options.real is not None and options.inception is None and options.published is None:
            raise UsageError(
                f"--real is for KID, which needs {least} images, and {count} are generated per combination; use --num-images "
                f"{least} or more, or remove --real"
            )
        else:
            notes.append(
                f"KID, precision and recall need {least} images, and {count} were generated (--num-images {least})."
            )
    if options.inception is not None:
        metrics |= _fid(run, options, real, count, device, notes)
    if options.published is not None and options.published.inception is not None:
        metrics |= _published_fid(options.published, key, device)
    if options.lpips is not None:
        metrics["lpips"] = lpips_metric(options.lpips, device)
    metrics |= {name: scorer_metric(SCORERS[name], word, device) for name, word in options.scorers.items()}
    for metric in metrics.values():
        check_count(metric, count)
    return Selection(metrics, key, tuple(notes))


def _add_kid(
    metrics: dict[str, Metric],
    key: dict[str, Any],
    notes: list[str],
    network: tuple[Any, str],
    real: Sequence[str],
    run: EvaluatedRun,
    count: int,
    *,
    is_requested: bool,
) -> None:
    """Add KID to real images, or a note that there are too few of them. is_requested: whether --real names them."""
    images, words = real_images(real, run.config.data.resolution, 2 * count), ", ".join(map(public_word, real))
    least = metrics["kid_teacher"].min_images
    if len(images) >= least:
        metrics["kid"] = kid_metric(*network, features_of(network[0], images), f"{len(images)} real images of {words}")
        key["real"] = [list(real), len(images), digest(images.mean((1, 2, 3)).tolist())]
    elif is_requested:
        raise UsageError(
            f"--real {words} has {len(images)} images, and KID needs {least}; add images, or remove --real"
        )
    else:
        notes.append(f"KID to real images needs {least} of them, and {words} has {len(images)}.")


def _fid(
    run: EvaluatedRun,
    options: EvaluationOptions,
    real: Sequence[str],
    count: int,
    device: torch.device,
    notes: list[str],
) -> dict[str, Metric]:
    """Return FID to the teacher's images, and to real ones where there are enough, or a note that there are not."""
    if count < FID_IMAGES:
        raise UsageError(
            f"--inception: FID needs at least {FID_IMAGES} images because its bias dominates below, and --num-images is "
            f"{count}; pass --num-images {FID_IMAGES}, or use KID"
        )
    assert options.inception is not None
    network, name = ScriptedFeatures(options.inception, "--inception").to(device), options.inception.stem
    resolution = run.config.data.resolution
    metrics = fid_to_teacher_metrics(network, name, resolution)
    images = real_images(real, resolution, max(count, FID_IMAGES)) if real else torch.zeros(0)
    if len(images) >= FID_IMAGES or options.real is not None:
        words = ", ".join(map(public_word, real))
        metrics["fid"] = fid_metric(network, name, features_of(network, images), words)
    else:
        notes.append(
            f"FID to real images needs {FID_IMAGES} of them that belong to the prompts, and there are {len(images)}."
        )
    return metrics


def _published_fid(published: PublishedRun, key: dict[str, Any], device: torch.device) -> dict[str, Metric]:
    """Return FID and patch FID as a protocol computes them.

    Raises:
        UsageError: There are not as many real images as the protocol has.
    """
    protocol, real = published.protocol, None
    assert published.inception is not None
    network = ScriptedFeatures(published.inception, "--inception").to(device)
    key["protocol"] = [protocol.key, fingerprint([published.inception]), published.real]
    if published.real is not None:
        changes = (whole_image(protocol.fid_side), central_patch)
        real = real_features(network, published.real, protocol.num_images, changes)
        if len(real[0]) < protocol.num_images:
            raise UsageError(
                f"--protocol {protocol.key} compares with {protocol.num_images} real images, and {redact_word(published.real)} "
                f"has {len(real[0])}; pass all of them with --real, or fewer images with --num-images, which omits FID"
            )
    return published_fid_metrics(network, protocol.fid_side, real, protocol.num_images, protocol.key)


def fingerprint(files: Sequence[Path]) -> str:
    """Return a hash of the files' contents."""
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "blake2b").digest())
    return total.hexdigest()


def _file_sizes(path: Path) -> list[tuple[str, int]]:
    """Return what tells a model's local files from others without reading them; [] for a hub id."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    return [(each.name, each.stat().st_size) for each in files]


def real_sources(runs: Sequence[EvaluatedRun], options: EvaluationOptions, choice: PromptChoice) -> tuple[str, ...]:
    """Return the sources of real images for all runs: --real, or the runs' data where the prompts belong to them.

    Prompts belong to the user's own images if they are their captions, and to bundled images if they come with them.

    Raises:
        UsageError: What --real names does not exist.
    """
    if options.real is not None:
        with _named_real():
            make_source(options.real)
        return (options.real,)
    words = [word for run in runs for word in run.config.data.sources if _holds_images(word)]
    bundled = tuple(dict.fromkeys(word for word in words if word == BundledShards.kind))
    own = tuple(dict.fromkeys(word for word in words if word != BundledShards.kind))
    distinct = len(set(choice.prompts))
    if choice.are_own and distinct >= MIN_KID_IMAGES:
        return own
    if own and choice.are_own:
        logger.info(
            f"no KID to the images of {redact_word(own[0])}: {distinct} of their captions are too few to stand for all of "
            f"them, {MIN_KID_IMAGES} are needed (--set data.holdout, --num-images)"
        )
    elif words and (not bundled or options.prompts is not None):
        logger.info(
            f"no KID to the images of {redact_word(words[0])}: the prompts are not their captions; pass --real with images "
            "that belong to --prompts"
        )
    elif not choice.are_own:
        return bundled
    return ()


def _holds_images(word: str) -> bool:
    """Return whether a data source still holds local images. Nothing is downloaded and no command is run for this."""
    try:
        source = make_source(word)
        return not (source.is_remote or source.is_generated)
    except UsageError:
        return False


@contextmanager
def _named_real() -> Iterator[None]:
    """Let the errors of a source of real images name --real, which is not for training data."""
    try:
        yield
    except (UsageError, RunError) as error:
        message = str(error).replace("--data", "--real")
        raise type(error)(message.replace("tiny, or teacher to train without a data set", "or tiny")) from error


def real_images(sources: Sequence[str], resolution: int, count: int) -> Tensor:
    """Return real images in [0, 1], (at most count, 3, H, W), spread evenly over sources or over their beginning.

    Raises:
        UsageError: A source does not exist or holds no images.
        RunError: A source cannot be read.
    """
    data, each, pixels = DataConfig(resolution=resolution), -(-count // len(sources)), []
    for source in sources:
        with _named_real():
            members = list(make_source(source).members(32 * each))
        stride = max(1, len(members) // each)
        samples = (
            check_sample(replace(member, caption="real"), data, 0, i) for i, member in enumerate(members[::stride])
        )
        some = islice((o.pixels for o in samples if isinstance(o, Sample) and o.pixels is not None), each)
        pixels += some
    if len(pixels) < 2:
        raise UsageError(f"--real {sources[0]} holds no images; specify an image folder or shards")
    return (torch.stack(pixels[:count]) + 1) / 2
