"""What a run made, written and loaded again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lcmdistill.checkpoint import checkpoints, file_written_aside, load_checkpoint, written_aside
from lcmdistill.config import flatten
from lcmdistill.errors import UsageError
from lcmdistill.export.lora_files import Lora, from_checkpoint, header, write_kohya, write_peft
from lcmdistill.export.pipeline import save_pipeline, student_pipeline
from lcmdistill.lora import ONLINE, put_lora
from lcmdistill.methods import METHODS, Method
from lcmdistill.modelcard import model_card
from lcmdistill.rundir import has_product, recorded, teacher_of
from lcmdistill.settings import RunConfig
from lcmdistill.student import Student
from lcmdistill.teachers import load_pipeline, load_teacher, resolve_alias
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.drawing import network_of


@dataclass(frozen=True)
class Product:
    """A finished run. recorded: its settings, {"section.key": value}; lora: its adapter, None for a full student."""

    run: Path
    recorded: Mapping[str, Any]
    lora: Lora | None

    @property
    def method(self) -> Method:
        """What the run's objective is called, and what samples its student."""
        return METHODS[self.recorded["objective.name"]]

    @property
    def guidance_scale(self) -> float:
        """What the run recommends to draw with, in diffusers' convention."""
        return float(self.recorded["run.validation_guidance_scale"])

    @property
    def is_xl(self) -> bool:
        """Whether it is SDXL's, as far as the run's own files tell."""
        if self.lora is None:
            return (self.run / "pipeline" / "text_encoder_2").is_dir()
        (path,) = (self.run / "lora").glob("*.safetensors")
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("ss_base_model_version", "").startswith("sdxl")

    def teacher(self) -> Teacher:
        """The teacher, loaded afresh."""
        return load_teacher(**teacher_of(self.recorded))

    def base_pipeline(self) -> Any:
        """The teacher on the student's scheduler: what a LoRA is loaded into."""
        teacher = self.teacher()
        return student_pipeline(
            teacher, teacher.network, self.recorded["data.resolution"], scheduler=self.method.scheduler
        )

    def pipeline(self) -> Any:
        """The student as a diffusers pipeline in fp32; a LoRA's has the adapter on, unfused."""
        if self.lora is None:
            return load_pipeline(str(self.run / "pipeline"))
        pipeline = self.base_pipeline()
        put_lora(network_of(pipeline), self.lora, ONLINE)
        return pipeline


def write_product(config: RunConfig, folder: Path, teacher: Teacher, student: Student) -> Path:
    """What the run was for: RUN/pipeline of a full student, RUN/lora of an adapter. Returns its path."""
    if config.student.kind == "lora":
        lora = from_checkpoint(student.averaged or student.trainable, config.student.alpha)
        if teacher.network_name != "unet":  # peft's folder is what a transformer's readers know
            with written_aside(folder / "lora") as aside:
                write_peft(lora, aside, resolve_alias(config.teacher.model))
            return folder / "lora"
        path = folder / "lora" / f"{folder.name}.safetensors"
        with file_written_aside(path) as aside:
            write_kohya(lora, aside, header(lora, flatten(config), folder.name, teacher.pipeline))
        return path
    scheduler = METHODS[config.objective_name].scheduler
    pipeline = student_pipeline(teacher, student.for_export(), config.data.resolution, scheduler=scheduler).to("cpu")
    save_pipeline(pipeline, folder / "pipeline", model_card(config, folder, teacher))
    return folder / "pipeline"


def load_product(run: Path) -> Product:
    """A finished run's product. Raises UsageError if the folder is no run, or the run has not finished."""
    found = recorded(run)
    if not found:
        raise UsageError(f"{run} is no run of lcmdistill: it holds no config.toml; name a folder such as runs/tiny-lcm")
    if found.get("student.kind", "full") == "full":
        if not has_product(run):
            raise UsageError(f"the run {run} has no pipeline/ yet; run its distill command again to finish it")
        return Product(run, found, None)
    saved = checkpoints(run / "checkpoints")
    if not saved or not has_product(run):
        raise UsageError(f"the run {run} has no lora/ yet; run its distill-lora command again to finish it")
    groups, _ = load_checkpoint(saved[-1])
    return Product(run, found, from_checkpoint(groups["target"] or groups["student"], float(found["student.alpha"])))
