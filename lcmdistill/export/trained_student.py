"""The trained student of a finished run, loaded for an export."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

from lcmdistill.config.schema import RunConfig
from lcmdistill.export.relative_lora import base_of_file
from lcmdistill.export.sampling_facts import SamplingFacts, facts_from_run
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.objectives.recorded import has_trained_student, require_run_config
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.students.lora import ONLINE
from lcmdistill.students.lora_files import SCHEDULER_KEY, SCHEDULER_OPTIONS_KEY
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.lora.adapters import LoraLayer, put_lora
from lcmdistill.teachers.lora.files import Lora
from lcmdistill.teachers.lora.kinds import FAMILY_KEY
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.utils.checkpoint import load_best, load_checkpoint
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.metrics_log import read_metrics
from lcmdistill.utils.run_dir import checkpoints, lora_file


@dataclass(frozen=True)
class TrainedStudent:
    """The student of a finished run.

    Attributes:
        run: The run folder.
        config: The run's settings.
        lora: The adapter; None for a full student.
        weights: The weights of a full student that replace those in the run's pipeline.
    """

    run: Path
    config: RunConfig
    lora: Lora | None
    weights: Mapping[str, Tensor] | None = None

    @property
    def method(self) -> MethodInfo:
        """The names and the sampler of the run's objective."""
        return self.config.objective.info

    @property
    def family(self) -> TeacherFamily:
        """The teacher's family, according to the run's files."""
        return self.facts.family

    @cached_property
    def facts(self) -> SamplingFacts:
        """How the student is sampled, as the run's files record it."""
        return facts_from_run(self.run, self.config)

    def require_lora(self) -> Lora:
        """Return the adapter of a LoRA student."""
        if self.lora is None:
            raise ValueError(f"{self.run} is a full student")
        return self.lora

    def sampling_header(self) -> dict[str, str]:
        """Return the header strings of the run's LoRA that name its scheduler and the options."""
        with safe_open(lora_file(self.run), framework="pt") as file:
            header = file.metadata() or {}
        return {key: header[key] for key in (SCHEDULER_KEY, SCHEDULER_OPTIONS_KEY, FAMILY_KEY) if key in header}

    @property
    def guidance_scale(self) -> float:
        """The guidance scale that the run recommends, in diffusers' convention."""
        scale = self.config.run.validation_guidance_scale
        return 1.0 if scale is None else scale

    def teacher(self) -> Teacher:
        """Load the teacher."""
        return load_teacher(**dataclasses.asdict(self.config.teacher))

    def base_pipeline(self, *, of_file: bool = False) -> Any:
        """Load the teacher's pipeline with the student's scheduler: the base of an adapter.

        Args:
            of_file: Whether to load the base of the LoRA file instead, which may lack the teacher's own LoRAs.
        """
        teacher = load_teacher(**dataclasses.asdict(base_of_file(self.config))) if of_file else self.teacher()
        return student_pipeline(teacher, teacher.network, self.config.data.resolution, objective=self.config.objective)

    def pipeline(self) -> Any:
        """Load the student as a diffusers pipeline in fp32; an adapter is active and not merged."""
        if self.lora is None:
            pipeline = load_pipeline(str(self.run / "pipeline"))
            if self.weights is not None:
                network_of(pipeline).load_state_dict(self.weights)
            return pipeline
        pipeline = self.base_pipeline()
        put_lora(network_of(pipeline), self.lora, ONLINE)
        return pipeline


def load_trained_student(run: Path, weights: Literal["last", "best"] = "last") -> TrainedStudent:
    """Load the student of a finished run.

    Args:
        run: The run folder.
        weights: The final weights, or those of the best validation.

    Raises:
        UsageError: The folder is not a run, the run has not finished, or it has no best checkpoint.
    """
    config = require_run_config(run)
    if config.student.kind == "full":
        if not has_trained_student(run):
            raise UsageError(f"the run {run} has no pipeline/ yet; run its distill command again to finish it")
        return TrainedStudent(run, config, None, _best(run, config) if weights == "best" else None)
    file, saved = lora_file(run), checkpoints(run / "checkpoints")
    if not saved:
        raise UsageError(
            f"{run / 'checkpoints'} holds no checkpoint, and a LoRA is exported from the fp32 weights in it; restore it, or "
            f"use {file} as it is"
        )
    alpha = config.student.alpha
    if weights == "best":
        return TrainedStudent(run, config, from_checkpoint(_best(run, config), alpha))
    groups, _ = load_checkpoint(saved[-1])
    return TrainedStudent(run, config, from_checkpoint(groups["target"] or groups["student"], alpha))


def _best(run: Path, config: RunConfig) -> dict[str, Tensor]:
    best = load_best(run)
    if best is None:
        validated = sum(f"val/{config.run.best_metric}" in line for line in read_metrics(run))
        reason = "no validation was better than that of the untrained student"
        if validated < 2:
            reason = "the run was not validated (see run.validate_every and run.best_metric)"
        raise UsageError(f"--weights best: {run} has no best checkpoint, because {reason}; use --weights last")
    return best[1]


def from_checkpoint(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, LoraLayer]:
    """Return the tensors "path.lora_A" and "path.lora_B" of a checkpoint as a LoRA."""
    paths = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    plain = {key: tensor.detach().float().cpu() for key, tensor in tensors.items()}
    return {path: LoraLayer(plain[f"{path}.lora_A"], plain[f"{path}.lora_B"], alpha) for path in paths}
