"""What is evaluated: the options of an evaluation, and the finished runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.data.buckets import Size, bucket_sizes
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
