"""Write the student of a run in one of the EXPORTERS' formats."""

from pathlib import Path
from typing import Literal

import torch

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.export import EXPORTERS
from lcmdistill.export.base import Exporter, ExportRequest, WriteCard, no_card, usage_lines
from lcmdistill.export.diffusers_pipeline import save_pipeline
from lcmdistill.export.lora_formats import header, sampling_header
from lcmdistill.export.lora_writers import write_diffusers_lora, write_kohya, write_peft
from lcmdistill.export.relative_lora import written_lora
from lcmdistill.export.trained_student import TrainedStudent, from_checkpoint, load_trained_student
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.students.student import Student
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.naming import public_name
from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.checksums import write_checksums
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.run_dir import check_writable

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

RUN_FOLDERS = ("pipeline", "lora", "checkpoints", "samples")
"folders of a run that it replaces or reads as a whole"


def export(
    run: Path,
    name: str,
    output: Path,
    *,
    dtype: str,
    guidance_scale: float | None,
    verify: bool,
    quantize: str | None = None,
    weights: Literal["last", "best"] = "last",
    write_card: WriteCard = no_card,
) -> str:
    """Write the student of a run in a format, and compare the reloaded output with the student.

    Args:
        run: The run folder.
        name: A key of EXPORTERS.
        output: The file or folder to write.
        dtype: "fp16", "bf16" or "fp32".
        guidance_scale: The guidance to bake in; None for the run's own.
        verify: Whether to compare.
        quantize: One of the format's quantizations, or None.
        weights: The final weights, or those of the best validation.
        write_card: Writes the model card of a folder.

    Returns:
        A sentence with the largest difference, and a line per program on how the output is used.

    Raises:
        UsageError: The run cannot be written in this format, or not there.
        RunError: The output could not be written, or it differs from the student.
    """
    exporter: Exporter = EXPORTERS[name]
    if quantize is not None and quantize not in exporter.quantizations:
        others = " or ".join(f"--format {key}" for key, each in EXPORTERS.items() if quantize in each.quantizations)
        raise UsageError(f"--quantize {quantize} is for {others}; remove this option, or use --dtype for {name}")
    student = load_trained_student(run, weights)
    _check_format(exporter, student, guidance_scale)
    _check_output(exporter, run, output)
    request = ExportRequest(
        output=output,
        dtype=DTYPES[dtype],
        guidance_scale=student.guidance_scale if guidance_scale is None else guidance_scale,
        verify=verify,
        quantize=quantize,
        write_card=write_card,
    )
    try:
        sentence = exporter.write(student, request)
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error}") from error
    place, file = (output.parent, output.name) if exporter.writes == "file" else (output, "")
    lines = usage_lines(exporter, exporter.usage(student.config, student.facts, str(place), file))
    return "\n".join([sentence, *lines])


def _check_format(exporter: Exporter, student: TrainedStudent, guidance_scale: float | None) -> None:
    kind = student.config.student.kind
    if kind not in exporter.student_kinds:
        formats = ", ".join(key for key, each in EXPORTERS.items() if kind in each.student_kinds)
        names = {"full": "full students", "lora": "LoRA runs"}
        raise UsageError(
            f"--format {exporter.key} is for {names[exporter.student_kinds[0]]} and {student.run} is a "
            f"{'LoRA run' if kind == 'lora' else 'full student'}; use --format {formats}"
        )
    is_input = kind == "full" and omega_range(student.config) is not None
    if guidance_scale is not None and not (exporter.bakes_guidance and is_input):
        formats = ", ".join(key for key, each in EXPORTERS.items() if each.bakes_guidance)
        raise UsageError(
            f"--guidance-scale {guidance_scale:g} has no effect here: only --format {formats} bakes guidance in, for full "
            "students with a guidance input; remove this option"
        )


def _check_output(exporter: Exporter, run: Path, output: Path) -> None:
    if output.exists():
        raise UsageError(f"--output {output} exists; specify a new one")
    if exporter.writes == "file" and output.suffix != ".safetensors":
        raise UsageError(f"--output {output} must end in .safetensors for --format {exporter.key}")
    inside = run.resolve() in output.resolve().parents
    if inside and output.resolve().relative_to(run.resolve()).parts[0] in RUN_FOLDERS:
        raise UsageError(f"--output {output} is in a folder that the run itself writes; choose a place outside of it")
    check_writable(output)


def write_trained_student(config: RunConfig, folder: Path, teacher: Teacher, student: Student, card: str) -> Path:
    """Write the result of a run: RUN/pipeline for a full student, RUN/lora for an adapter.

    Args:
        config: The run's settings.
        folder: The run folder.
        teacher: The teacher.
        student: The trained student.
        card: The model card of the pipeline folder.

    Returns:
        The written file or folder.
    """
    if config.student.kind == "lora":
        lora = from_checkpoint(student.weights, config.student.alpha)
        name = f"{folder.name}.safetensors"
        # The folder is replaced as a whole: a run that resumes under another name leaves no LoRA of the old name.
        with atomic_dir(folder / "lora") as partial:
            parts, family = written_lora(lora, config, teacher.pipeline), teacher.family
            of_network = parts[teacher.network_name]
            if family.uses_peft_only:
                base = public_name(config.teacher.model)
                write_peft(of_network, partial, base, sampling_header(config, teacher.pipeline))
            else:
                write = write_kohya if family.run_lora_format == "kohya" else write_diffusers_lora
                write(parts, partial / name, header(of_network, config, folder.name, teacher.pipeline), family)
            write_checksums(partial)
        return folder / "lora" if teacher.family.uses_peft_only else folder / "lora" / name
    network = student.for_export()
    pipeline = student_pipeline(teacher, network, config.data.resolution, objective=config.objective).to("cpu")
    save_pipeline(pipeline, folder / "pipeline", card)
    return folder / "pipeline"
