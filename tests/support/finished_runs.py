"""What a finished run leaves, without the training."""

from pathlib import Path
from typing import Any

from torch import nn

from lcmdistill.config.schema import StudentConfig
from lcmdistill.config.toml import to_toml
from lcmdistill.export.diffusers_pipeline import save_pipeline
from lcmdistill.export.lora_formats import header
from lcmdistill.export.lora_writers import write_diffusers_lora, write_kohya
from lcmdistill.export.trained_student import from_checkpoint
from lcmdistill.hub.model_card import write_run_card
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.students.full import full_student
from lcmdistill.students.lora import ONLINE, add_lora
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.lora.adapters import adapter_parameters
from lcmdistill.utils.checkpoint import save_checkpoint
from tests.support.runs import resolve
from tests.support.teachers import fill


def finished_run(teacher_folder: Path, kind: str, run: Path, **settings: Any) -> Path:
    """The folder of a run: a full student whose omega input does something, or a LoRA far from zero, alpha != rank.

    settings: of the run, with two underscores for the dot.
    """
    teacher = load_teacher(str(teacher_folder))
    flags: dict[str, Any] = {"teacher.model": str(teacher_folder), "student.kind": kind, "data.resolution": 32}
    flags |= {key.replace("__", "."): value for key, value in settings.items()}
    if kind == "full":
        objective = resolve({}, flags).objective
        takes_omega = "random" if objective.omega == "input" else None
        student = full_student(teacher.network, takes_omega, seed=3).eval().requires_grad_(False)
        if has_omega_input(student):
            student.time_embedding.cond_proj.weight.mul_(4.0)
        save_pipeline(student_pipeline(teacher, student, objective=objective), run / "pipeline", "")
        flags["run.validation_guidance_scale"] = 4.0
    else:
        shape = StudentConfig(kind="lora", rank=4, alpha=3.0)
        add_lora(teacher.network, ONLINE, shape, seed=0)
        adapter = adapter_parameters(teacher.network, ONLINE)
        fill(nn.ParameterDict({key.replace(".", "/"): value for key, value in adapter.items()}), 5)
        (run / "lora").mkdir(parents=True)
        save_checkpoint(run / "checkpoints", 1, {"student": {}, "target": adapter}, {})
        flags |= {"student.rank": 4, "student.alpha": 3.0, "run.validation_guidance_scale": 1.0}
    config = resolve({}, flags)
    if kind == "lora":
        lora = from_checkpoint(adapter, 3.0)
        metadata = header(lora, config, run.name, teacher.pipeline)
        write = write_kohya if "kohya" in teacher.family.lora_formats else write_diffusers_lora
        write({teacher.family.network: lora}, run / "lora" / f"{run.name}.safetensors", metadata, teacher.family)
    (run / "config.toml").write_text(to_toml(config))
    write_run_card(config, run, teacher)
    return run
