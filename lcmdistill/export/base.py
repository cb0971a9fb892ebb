"""The contract of an export format, and the facts that its instructions are written from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.lora_words import split_lora
from lcmdistill.config.schema import RunConfig
from lcmdistill.export.trained_student import SamplingFacts, TrainedStudent
from lcmdistill.objectives.base import MethodInfo, StepCounts
from lcmdistill.objectives.common import most_steps
from lcmdistill.teachers.lora.adapters import merge_lora
from lcmdistill.teachers.naming import loading_code
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.spelling import or_list

WriteCard = Callable[[TrainedStudent, str, Path, Path], None]
"(student, format, output, folder): writes the card of an export into the folder that becomes the output"


def no_card(student: TrainedStudent, name: str, output: Path, folder: Path) -> None:
    """Write no card."""


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        output: The file or folder to write.
        dtype: The dtype of the weights.
        guidance_scale: The guidance to bake in, in diffusers' convention (omega + 1).
        verify: Whether to reload the output as its consumer does and compare it with the student.
        quantize: One of the format's `quantizations`, or None.
        write_card: Writes the model card of a folder.
    """

    output: Path
    dtype: torch.dtype
    guidance_scale: float
    verify: bool
    quantize: str | None = None
    write_card: WriteCard = no_card


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a format's instructions mention: where one export is, and how its student is sampled.

    Attributes:
        place: The hub repository or folder that holds the export.
        file: The file name inside of it; "" for a folder.
        method: The student's method.
        counts: The numbers of sampling steps that the student is made for.
        steps: The recommended number of sampling steps.
        guidance_scale: The recommended guidance scale, which is CFG in user interfaces.
        call: The Python expression that generates an image with `pipeline`.
        facts: How the student is sampled.
        model: The teacher, as the run's configuration names it.
        loras: The LoRAs of the teacher that its student must be used with; () if the export contains them.
    """

    place: str
    file: str
    method: MethodInfo
    counts: StepCounts
    steps: int
    guidance_scale: float
    call: str
    facts: SamplingFacts
    model: str
    loras: tuple[str, ...] = ()

    @property
    def scheduler_options(self) -> str:
        """Arguments of `from_config` that follow the teacher's scheduler config, or "".

        A teacher's solver such as DPM-Solver has another name for the shift, which flow-matching schedulers do not read.
        """
        shift = {} if self.facts.shift is None else {"shift": self.facts.shift}
        return _arguments({**shift, **self.facts.scheduler_options})

    @property
    def absent_options(self) -> str:
        """Arguments that open a pipeline without the text encoders that its student was trained without, or ""."""
        return "".join(f", {part}=None" for part in self.facts.absent_parts)

    @property
    def base_code(self) -> str:
        """Python code that opens the teacher as `pipeline`, with the student's scheduler."""
        code = loading_code(
            self.model,
            self.facts.family.pipeline_classes[0],
            self.method.scheduler,
            self.scheduler_options,
            self.absent_options,
        )
        for lora in map(split_lora, self.loras):
            code += f'pipeline.load_lora_weights("{lora.name}")\npipeline.fuse_lora(lora_scale={lora.scale:g})\n'
            code += "pipeline.unload_lora_weights()\n"
        return code

    @property
    def settings(self) -> str:
        """Steps and guidance as user interfaces name them. ComfyUI has a node for a guidance scale that is an input."""
        if self.facts.family.embeds_guidance:
            return f"{self.steps} steps, CFG 1; node FluxGuidance set to {self.guidance_scale:g}"
        return f"{self.steps} steps, CFG {self.guidance_scale:g}"


def _arguments(values: Mapping[str, Any]) -> str:
    """Return keyword arguments in Python, each after a comma."""
    return "".join(f", {name}={value!r}".replace("'", '"') for name, value in values.items())


class ProgramUse(NamedTuple):
    """How a file is used in one program.

    Attributes:
        program: The program's name.
        lines: A sentence each.
        is_supported: Whether the program can sample the student; otherwise the lines say why not.
    """

    program: str
    lines: tuple[str, ...]
    is_supported: bool = True


def no_programs(usage: Usage) -> Sequence[ProgramUse]:
    """Return no instructions: only Python code reads the format."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """An export format. Everything that is known about a format is in the file that makes its Exporter.

    Attributes:
        key: The name in EXPORTERS and for `--format`.
        title: What it writes, in a few words.
        student_kinds: The kinds of student it takes: "full", "lora" or both.
        writes: Whether its output is one .safetensors file or a folder.
        write: Writes the output and returns one sentence for the user.
        python: Returns the Python code that opens the output and generates an image.
        programs: Returns how the output is used in other programs.
        library: What the Python code opens the output with.
        quantizations: The values of `--quantize` that it takes.
        bakes_guidance: Whether it bakes the guidance of a full student in, and so takes `--guidance-scale`.
        keeps_omega_input: Whether a full student keeps its guidance input.
    """

    key: str
    title: str
    student_kinds: tuple[Literal["full", "lora"], ...]
    writes: Literal["file", "folder"]
    write: Callable[[TrainedStudent, ExportRequest], str]
    python: Callable[[Usage], str]
    programs: Callable[[Usage], Sequence[ProgramUse]] = no_programs
    library: str = "diffusers"
    quantizations: tuple[str, ...] = ()
    bakes_guidance: bool = False
    keeps_omega_input: bool = False

    def usage(
        self, config: RunConfig, facts: SamplingFacts, place: str, file: str = "", steps: int | None = None
    ) -> Usage:
        """Return the facts for this format's instructions.

        Args:
            config: The run's settings.
            facts: How its student is sampled.
            place: The hub repository or folder that holds the export.
            file: The file name inside of it.
            steps: The number of sampling steps to recommend; by default the method's.
        """
        method = config.objective.info.for_teacher(is_flow=facts.is_flow)
        keeps_input = self.keeps_omega_input and config.student.kind == "full" and facts.has_omega_input
        is_input = keeps_input or facts.family.embeds_guidance
        is_free = omega_range(config) is None
        guidance = (config.run.validation_guidance_scale or 1.0) if is_input or is_free else 1.0
        counts = StepCounts(2, 1, 2) if facts.family.in_pixels else method.steps(config.objective)
        count = min(steps or counts.recommended, most_steps(facts.scheduler_options))
        call = method.pipeline_call(count, guidance)
        if facts.family.in_pixels:
            call = f"pipeline(num_inference_steps={count}{', class_labels=0' if facts.classes else ''})"
        elif config.teacher.clip_skip and facts.family.clip_skip == "recorded":  # its weights cannot skip layers
            call = f"{call.removesuffix(')')}, clip_skip={config.teacher.clip_skip})"
        elif not facts.family.sample_size_is_default:  # saved students keep the teacher's size
            side = config.data.resolution
            size = {"height": side, "width": side, **facts.family.extra_call_kwargs(1, side, side, None)}
            call = f"{call.removesuffix(')')}{_arguments(size)})"
        # diffusers' U-Net pipelines read what flow-matching schedulers lack.
        is_flow_unet = facts.is_flow and facts.family.network == "unet"
        before = "pipeline.scheduler.init_noise_sigma = 1.0\n" if is_flow_unet else ""
        return Usage(
            place=place,
            file=file,
            method=method,
            counts=counts,
            steps=count,
            guidance_scale=guidance,
            call=f"{before}image = {call}.images[0]",
            facts=facts,
            model=config.teacher.model,
            loras=(config.teacher.loras or ()) if needs_loras(config) else (),
        )


def library_line(exporter: Exporter, usage: Usage) -> str:
    """Return how an export is used in Python: what opens it, with which scheduler, steps and guidance scale."""
    guidance = "" if usage.facts.family.in_pixels else f", guidance scale {usage.guidance_scale:g}"
    steps = f"{usage.steps} step{'s' * (usage.steps != 1)}"
    options = "".join(f", {name} {value:g}" for name, value in usage.method.sampling_options.items())
    return f"{exporter.library}: scheduler {usage.method.scheduler}, {steps}{guidance}{options}."


def usage_lines(exporter: Exporter, usage: Usage) -> list[str]:
    """Return how an export is used, one line per program: where its file goes, the sampler, the steps and CFG."""
    programs = [f"{use.program}: {' '.join(use.lines)}" for use in exporter.programs(usage)]
    return [f"  {line}" for line in (*programs, library_line(exporter, usage))]


def needs_loras(config: RunConfig) -> bool:
    """Return whether a run's student is a LoRA that must be used together with the LoRAs of its teacher."""
    is_relative = config.student.kind == "lora" and config.student.lora_relative_to == "teacher"
    return is_relative and bool(config.teacher.loras)


def merge_adapter(student: TrainedStudent, pipeline: Any) -> None:
    """Merge the adapter of a LoRA student into the network of its pipeline."""
    if student.lora is not None:
        merge_lora(network_of(pipeline))


def require_support(pipeline: Any, name: str, kind: str, is_supported: bool) -> None:
    """Raise UsageError for a student whose family has no such format.

    Args:
        pipeline: The student's pipeline.
        name: The format's key.
        kind: The kind of the student: "full" or "lora".
        is_supported: Whether the family has the format.
    """
    if not is_supported:
        family = family_of(pipeline)
        others = ("pipeline",) if kind == "full" else (*family.lora_formats, "fused")
        raise UsageError(f"--format {name} is not available for {family.title}; use {or_list(others)}")


def unverified(output: Path) -> str:
    """Return the sentence of an export without verification."""
    return f"{output}: not verified"
