"""What a run made, written and loaded again."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

from lcmdistill.config.schema import RunConfig
from lcmdistill.export.diffusers_pipeline import save_pipeline
from lcmdistill.export.lora_formats import from_checkpoint, header, sampling_header, write_kohya, write_peft
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.objectives.recorded import has_trained_student, require_run_config
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.students.lora import ONLINE, put_lora
from lcmdistill.students.lora_files import ORIGINAL_STEPS_KEY, SCHEDULER_KEY, Lora, family_of_lora
from lcmdistill.students.student import Student
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.naming import public_name
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import FAMILIES, family_of_folder
from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.checkpoint import load_best, load_checkpoint
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints, lora_file


@dataclass(frozen=True)
class TrainedStudent:
    """A finished run. config: its settings; lora: its adapter, None for a full student.

    weights: of a full student, those that are to take the place of its last ones.
    """

    run: Path
    config: RunConfig
    lora: Lora | None
    weights: Mapping[str, Tensor] | None = None

    @property
    def method(self) -> MethodInfo:
        """What the run's objective is called, and what samples its student."""
        return self.config.objective.info

    @property
    def family(self) -> TeacherFamily:
        """The teacher's family, as far as the run's own files tell."""
        if self.lora is not None:
            return family_of_lora(self.run / "lora")
        return family_of_folder(self.run / "pipeline") or FAMILIES["sd"]

    def sampling_header(self) -> dict[str, str]:
        """Return the header strings of the run's LoRA that name its scheduler and time steps."""
        with safe_open(lora_file(self.run), framework="pt") as file:
            header = file.metadata() or {}
        return {key: header[key] for key in (SCHEDULER_KEY, ORIGINAL_STEPS_KEY) if key in header}

    @property
    def guidance_scale(self) -> float:
        """What the run recommends to draw with, in diffusers' convention."""
        scale = self.config.run.validation_guidance_scale
        return 1.0 if scale is None else scale

    def teacher(self) -> Teacher:
        """The teacher, loaded afresh."""
        return load_teacher(**dataclasses.asdict(self.config.teacher))

    def base_pipeline(self) -> Any:
        """The teacher on the student's scheduler: what a LoRA is loaded into."""
        teacher = self.teacher()
        return student_pipeline(teacher, teacher.network, self.config.data.resolution, objective=self.config.objective)

    def pipeline(self) -> Any:
        """The student as a diffusers pipeline in fp32; a LoRA's has the adapter on, unfused."""
        if self.lora is None:
            pipeline = load_pipeline(str(self.run / "pipeline"))
            if self.weights is not None:
                network_of(pipeline).load_state_dict(self.weights)
            return pipeline
        pipeline = self.base_pipeline()
        put_lora(network_of(pipeline), self.lora, ONLINE)
        return pipeline


def write_trained_student(config: RunConfig, folder: Path, teacher: Teacher, student: Student, card: str) -> Path:
    """What the run was for: RUN/pipeline of a full student, RUN/lora of an adapter. Returns its path."""
    if config.student.kind == "lora":
        lora = from_checkpoint(student.averaged or student.trainable, config.student.alpha)
        name = f"{folder.name}.safetensors"
        # As a whole, so that a run which goes on under another name leaves no LoRA of the old one beside the new.
        with atomic_dir(folder / "lora") as aside:
            if not teacher.family.uses_peft_only:
                write_kohya(lora, aside / name, header(lora, config, folder.name, teacher.pipeline))
                return folder / "lora" / name
            base = public_name(config.teacher.model)
            write_peft(lora, aside, base, sampling_header(config, teacher.pipeline))  # the one format it has
            return folder / "lora"
    network = student.for_export()
    pipeline = student_pipeline(teacher, network, config.data.resolution, objective=config.objective).to("cpu")
    save_pipeline(pipeline, folder / "pipeline", card)
    return folder / "pipeline"


def load_trained_student(run: Path, weights: Literal["last", "best"] = "last") -> TrainedStudent:
    """A finished run's product. weights: those of its end, or of its best validation.

    Raises UsageError if the folder is no run, the run has not finished, or it has kept no best.
    """
    config = require_run_config(run)
    if config.student.kind == "full":
        if not has_trained_student(run):
            raise UsageError(f"the run {run} has no pipeline/ yet; run its distill command again to finish it")
        return TrainedStudent(run, config, None, _best(run) if weights == "best" else None)
    file, saved = lora_file(run), checkpoints(run / "checkpoints")
    if not saved:
        raise UsageError(
            f"{run / 'checkpoints'} holds no checkpoint, from which a LoRA is exported in all its precision; put it back, or "
            f"use {file} as it is"
        )
    alpha = config.student.alpha
    if weights == "best":
        return TrainedStudent(run, config, from_checkpoint(_best(run), alpha))
    groups, _ = load_checkpoint(saved[-1])
    return TrainedStudent(run, config, from_checkpoint(groups["target"] or groups["student"], alpha))


def _best(run: Path) -> dict[str, Tensor]:
    kept = load_best(run)
    if kept is None:
        raise UsageError(
            f"--weights best: {run} has kept no best validation (run.validate_every and run.best_metric); export the last"
        )
    return kept[1]
