"""What is evaluated: the options of an evaluation, and the finished runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.data.buckets import Size, bucket_sizes
from lcmdistill.evaluation.protocols import PROTOCOLS, NeededFile, PublishedRun
from lcmdistill.evaluation.scorers.base import cached_snapshot
from lcmdistill.objectives.recorded import has_trained_student, require_run_config
from lcmdistill.sampling.generate import ModelToSample, find_model
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.registry import family_of_folder
from lcmdistill.utils.errors import UsageError

SEED = 2026

STEPS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of an evaluation. None and () are the defaults of the run.

    Attributes:
        steps: The step counts to sample.
        guidance_scales: The guidance scales; the verdict uses the first.
        prompts: A file of prompts.
        num_images: The number of images per sweep point.
        seed: The seed of the noise.
        batch_size: How many images to generate at once.
        device: The device name.
        real: A data source of real images.
        features: A TorchScript feature network for KID.
        inception: A TorchScript Inception for FID.
        lpips: torchvision's AlexNet file.
        scorers: The weights of each scorer to use, by its key: a local path or a cached hub id.
        eta: gamma of a TCDScheduler; None is the method's default.
        protocol: The key of a published protocol.
        published: That protocol with its files; see `with_protocol`.
    """

    steps: tuple[int, ...] = STEPS
    guidance_scales: tuple[float, ...] = ()
    prompts: str | None = None
    num_images: int | None = None
    seed: int = SEED
    batch_size: int = 16
    device: str = "auto"
    real: str | None = None
    features: Path | None = None
    inception: Path | None = None
    lpips: Path | None = None
    scorers: Mapping[str, str] = field(default_factory=dict)
    eta: float | None = None
    protocol: str | None = None
    published: PublishedRun | None = None


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run with its recorded configuration and its student."""

    run: Path
    config: RunConfig
    model: ModelToSample

    @property
    def is_baked(self) -> bool:
        """Whether the guidance is in the weights: in a LoRA, and in a network without a guidance input."""
        family = None if self.model.loras else family_of_folder(self.run / "pipeline")
        return self.model.is_baked or (family is not None and family.in_pixels)

    @property
    def guidance_scale(self) -> float:
        """The recommended guidance scale in the teacher's terms: with baked guidance, that of the training."""
        if self.is_baked:
            omegas = omega_range(self.config)
            return omegas.middle if omegas else 1.0
        return float(self.model.guidance_scale or 1.0)

    def weight_files(self) -> list[Path]:
        """Return the student's weight files."""
        if self.model.loras:
            return [Path(path) for path in self.model.loras]
        return sorted((self.run / "pipeline").rglob("*.safetensors"))

    def bucket_sizes(self, teacher: Teacher) -> list[Size]:
        """Return the (height, width) of the run's aspect-ratio buckets; empty without buckets."""
        return bucket_sizes(self.config.data, teacher.multiple)


def evaluated_run(run: Path) -> EvaluatedRun:
    """Return a run to evaluate.

    Raises:
        UsageError: The folder is not a run, or the run has not finished or has no teacher.
    """
    config = require_run_config(run)
    if config.objective.info.start == "student":
        raise UsageError(
            f"{run} was fine-tuned without a teacher, so there is no reference; use: lcmdistill sample {run}"
        )
    if not has_trained_student(run):
        raise UsageError(f"the run {run} has not finished; run its distill command again first")
    return EvaluatedRun(run, config, find_model(str(run)))


def with_protocol(options: EvaluationOptions, folder: Path) -> EvaluationOptions:
    """Return the options with what their protocol prescribes and the command does not. Without a protocol, return them as is.

    The real images are only for the protocol's FID, hence they are no longer in `real`.

    Args:
        options: The options.
        folder: The folder of all protocols' files.

    Raises:
        UsageError: The protocol is unknown, or files are missing.
    """
    if options.protocol is None:
        return options
    protocol = PROTOCOLS.get(options.protocol)
    if protocol is None:
        raise UsageError(f"unknown --protocol {options.protocol}; choose one of {', '.join(PROTOCOLS)}")
    place, missing = folder / protocol.key, []

    def found(needed: NeededFile, own: str | Path | None) -> str:
        path = place / needed.name
        if own is None and not path.exists():
            missing.append(f"{needed.name} ({needed.content}; or {needed.option})")
        return str(path if own is None else own)

    count = options.num_images or protocol.num_images
    prompts = found(protocol.prompts, options.prompts)
    inception = real = None
    if count >= protocol.num_images:
        inception = found(protocol.inception, options.inception)
        real = found(protocol.real, options.real) if protocol.real else None
    scorers = dict(options.scorers)
    for name, hub_id in protocol.scorers.items():
        if name not in scorers:
            scorers[name] = str(place / name) if (place / name).exists() else hub_id
            if scorers[name] == hub_id and cached_snapshot(hub_id) is None:
                missing.append(f"{name} (hf download {hub_id}, or --scorer {name}=MODEL)")
    if missing:
        raise UsageError(f"--protocol {protocol.key} needs these files in {place}: {'; '.join(missing)}")
    own = [name for name in ("prompts", "inception", "real") if getattr(options, name) is not None]
    words = tuple(
        [f"--{name}" for name in own] + [f"--scorer {name}" for name in protocol.scorers if name in options.scorers]
    )
    published = PublishedRun(protocol, Path(inception) if inception else None, real, words)
    return replace(
        options, prompts=prompts, num_images=count, inception=None, real=None, scorers=scorers, published=published
    )
