"""The LoRA formats: `kohya` (ComfyUI, A1111, diffusers), `diffusers-lora` and `peft`, all with the trained alpha.

A LoRA is a mapping from a layer's path in the network to its LoraLayer.
"""

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.lora_words import lora_names, split_lora, with_loras
from lcmdistill.config.schema import RunConfig
from lcmdistill.export.base import (
    Exporter,
    ExportRequest,
    ProgramUse,
    Usage,
    needs_loras,
    unverified,
)
from lcmdistill.export.client_setup import header_needs, program_uses
from lcmdistill.export.lora_writers import write_diffusers_lora, write_kohya, write_peft
from lcmdistill.export.relative_lora import written_lora
from lcmdistill.export.sampling_facts import BETAS_KEY, SHIFT_KEY, ZERO_SNR_KEY, facts_from_pipeline, schedule_facts
from lcmdistill.export.single_file import architecture_of, file_header, layout_of
from lcmdistill.export.trained_student import TrainedStudent
from lcmdistill.export.verify import BOUNDS, Outputs, check_close, difference, network_outputs
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.students.lora_files import (
    DIFFUSERS_LORA,
    SCHEDULER_KEY,
    SCHEDULER_OPTIONS_KEY,
    alpha_of,
    rank_of,
)
from lcmdistill.teachers.lora.files import Lora
from lcmdistill.teachers.lora.kinds import FAMILY_KEY
from lcmdistill.teachers.naming import public_name
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.teachers.schedulers import is_flow
from lcmdistill.utils.atomic import atomic_dir, atomic_file
from lcmdistill.utils.errors import UsageError


def header(lora: Lora, config: RunConfig, title: str, base_pipeline: Any) -> dict[str, str]:
    """Return the header that user interfaces show: base model, rank, alpha, guidance, and how the file is used.

    Args:
        lora: The adapter.
        config: The run's settings.
        title: The file's name without its ending.
        base_pipeline: The teacher's pipeline, which decides the architecture.
    """
    base, side = public_name(config.teacher.model), config.data.resolution
    teacher = with_loras(base, config.teacher.loras)
    family = family_of(base_pipeline)
    method, omegas = _method(config, base_pipeline), omega_range(config)
    omega = f"{omegas.omega} (guidance scale {omegas.scale}, which is omega + 1)" if omegas else "free guidance"
    facts = facts_from_pipeline(base_pipeline, layout_of(base_pipeline).key if family.layouts else "")
    prediction_type = facts.prediction_type
    needs = f"; together with {lora_names(config.teacher.loras)}" if needs_loras(config) else ""
    needs += header_needs(facts, "CHECKPOINT") if family.layouts else ""
    skip = config.teacher.clip_skip
    cfg = "CFG 1 (up to 2)" if omegas else "CFG 1 to 4, negative prompts work"
    if family.embeds_guidance and omegas:
        omega, cfg = f"the embedded guidance scale {omegas.scale}", f"CFG 1, embedded guidance {omegas.scale}"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        **_base_header(base_pipeline, prediction_type),
        "modelspec.implementation": "diffusers",
        **file_header(config, title),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.description": f"{method.lora_title} {method.relation} {teacher} with {omega}",
        "modelspec.usage_hint": f"{method.sampler} sampler, {method.steps(config.objective).text}, {cfg}, LoRA weight 1{needs}",
        "modelspec.tags": f"{method.tags[0]},{method.lora_title.lower().replace(' ', '-')},lcmdistill",
        "modelspec.prediction_type": prediction_type.removesuffix("_prediction"),
        **sampling_header(config, base_pipeline),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank_of(lora)),
        "ss_network_alpha": f"{alpha_of(lora):g}",
        "ss_sd_model_name": base,
        "ss_resolution": f"({side}, {side})",
        "ss_output_name": title,
        "ss_steps": str(config.optim.max_train_steps),
        "ss_learning_rate": str(config.optim.learning_rate),
        "ss_seed": str(config.run.seed),
        **({"ss_clip_skip": str(family.a1111_clip_skip(skip))} if skip else {}),
        "ss_mixed_precision": str(config.run.precision),
        "ss_training_comment": f"{method.lora_title}, {method.describe(config.objective)}, {omegas.omega if omegas else omega}",
    }


def _base_header(base_pipeline: Any, prediction_type: str) -> dict[str, str]:
    """Return the header strings by which programs match a LoRA to its base; none where no program reads its files."""
    if not family_of(base_pipeline).layouts:
        return {}
    layout = layout_of(base_pipeline)
    architecture = architecture_of(base_pipeline, prediction_type) or architecture_of(base_pipeline, "epsilon")
    return {
        "modelspec.architecture": f"{architecture}/lora",
        "ss_base_model_version": layout.base_versions.get(prediction_type) or layout.base_versions["epsilon"],
        "ss_v2": str(layout.is_v2),  # A1111 distinguishes SD1 and SD2 by this
    }


def sampling_header(config: RunConfig, base_pipeline: Any) -> dict[str, str]:
    """Return the header strings that name the scheduler of a LoRA and its options.

    Args:
        config: The run's settings.
        base_pipeline: A pipeline with the teacher's number of time steps.
    """
    family = family_of(base_pipeline)
    count, method = base_pipeline.scheduler.config.num_train_timesteps, _method(config, base_pipeline)
    schedule = schedule_facts(base_pipeline.scheduler.config)
    return {
        SCHEDULER_KEY: method.scheduler,
        SCHEDULER_OPTIONS_KEY: json.dumps(dict(method.scheduler_options(config.objective, count))),
        **({} if "kohya" in family.lora_formats else {FAMILY_KEY: family.key}),
        **({ZERO_SNR_KEY: "true"} if schedule.zero_snr else {}),
        **({BETAS_KEY: json.dumps(schedule.betas)} if schedule.betas else {}),
        **({SHIFT_KEY: f"{schedule.shift:g}"} if schedule.shift else {}),
    }


def _method(config: RunConfig, base_pipeline: Any) -> MethodInfo:
    return config.objective.info.for_teacher(is_flow=is_flow(base_pipeline.scheduler.config))


def export_kohya(student: TrainedStudent, request: ExportRequest) -> str:
    """Write one .safetensors file for ComfyUI, A1111 and diffusers.

    Args:
        student: A LoRA student.
        request: What to write, and where.

    Returns:
        A sentence with the largest difference from the student.
    """
    lora = student.require_lora()
    with atomic_file(request.output) as file:
        parts, metadata, expected = _parts_header_and_outputs(student, request, lora, "kohya")
        write_kohya(parts, file, metadata, student.family, request.dtype)
        return _verify(student, request, expected, file.parent, file.name)


def export_diffusers_lora(student: TrainedStudent, request: ExportRequest) -> str:
    """Write a folder for diffusers' load_lora_weights, with the adapter's metadata.

    Args:
        student: A LoRA student.
        request: What to write, and where.

    Returns:
        A sentence with the largest difference from the student.
    """
    lora = student.require_lora()
    with atomic_dir(request.output) as folder:
        parts, metadata, expected = _parts_header_and_outputs(student, request, lora, "diffusers-lora")
        write_diffusers_lora(parts, folder / DIFFUSERS_LORA, metadata, student.family)
        return _verify(student, request, expected, folder, None)


def export_peft(student: TrainedStudent, request: ExportRequest) -> str:
    """Write a peft adapter folder.

    Args:
        student: A LoRA student.
        request: What to write, and where.

    Returns:
        A sentence with the largest difference from the student.
    """
    lora = student.require_lora()
    with atomic_dir(request.output) as folder:
        is_whole = student.config.student.lora_relative_to == "base"
        parts = written_lora(lora, student.config, student.pipeline()) if is_whole else {student.family.network: lora}
        if others := sorted(parts.keys() - {student.family.network}):
            raise UsageError(
                f"--format peft holds the network only, and the teacher's LoRAs also change the {others[0]}; use --format kohya"
            )
        write_peft(
            parts[student.family.network], folder, public_name(student.config.teacher.model), student.sampling_header()
        )
        if not request.verify:
            return unverified(request.output)
        from peft import PeftModel

        expected = network_outputs(student.family, network_of(student.pipeline()), request.guidance_scale)
        base = network_of(student.base_pipeline(of_file=True))
        reloaded = PeftModel.from_pretrained(base, str(folder)).get_base_model()
        outputs = network_outputs(student.family, reloaded, request.guidance_scale)
        return check_close(outputs, expected, BOUNDS[torch.float32], request.output)


def _parts_header_and_outputs(
    student: TrainedStudent, request: ExportRequest, lora: Lora, format_key: str
) -> tuple[Mapping[str, Lora], dict[str, str], Outputs]:
    """Return what a LoRA's file holds, its header, and its outputs; the pipeline is freed before another one is loaded."""
    trained = student.pipeline()
    family = family_of(trained)
    if format_key not in family.lora_formats:
        raise UsageError(
            f"--format {format_key} is not available for {family.title}; use --format {family.run_lora_format}, or fused for a "
            "full pipeline"
        )
    parts = written_lora(lora, student.config, trained)
    metadata = header(parts[family.network], student.config, student.run.name, trained)
    outputs = network_outputs(family, network_of(trained), request.guidance_scale) if request.verify else {}
    return parts, metadata, outputs


def _verify(student: TrainedStudent, request: ExportRequest, expected: Outputs, folder: Path, name: str | None) -> str:
    if not request.verify:
        return unverified(request.output)
    pipeline = student.base_pipeline(of_file=True)
    family = family_of(pipeline)
    base = network_outputs(family, network_of(pipeline), request.guidance_scale)
    pipeline.load_lora_weights(str(folder), weight_name=name or DIFFUSERS_LORA)
    # The base is in fp32 on both sides: half precision rounds only what the LoRA adds, which may be little.
    bound = BOUNDS[torch.float32]
    if name and request.dtype != torch.float32:
        bound += BOUNDS[request.dtype] * difference(base["network"], expected["network"])
    outputs = network_outputs(family, network_of(pipeline), request.guidance_scale)
    return check_close(outputs, expected, bound, request.output)


def kohya_code(usage: Usage) -> str:
    """Return the Python code that loads the file into its base model and generates an image."""
    return f'{usage.base_code}pipeline.load_lora_weights("{usage.place}", weight_name="{usage.file}")\n{usage.call}'


def diffusers_lora_programs(usage: Usage) -> tuple[ProgramUse, ...]:
    """Return how the file of a transformer is used in ComfyUI, which reads diffusers' keys of U-Nets differently."""
    family = usage.facts.family
    is_known = family.layouts or family.embeds_guidance  # to ComfyUI
    if family.network == "unet" or not is_known:
        return ()
    in_place = dataclasses.replace(usage, file=usage.file or DIFFUSERS_LORA)
    comfy = ("models/loras", "Load Checkpoint, Load LoRA at strength 1, ")
    return program_uses(in_place, "CHECKPOINT", comfy, None)


def kohya_programs(usage: Usage) -> tuple[ProgramUse, ...]:
    """Return how the file is used in ComfyUI and A1111."""
    stem = usage.file.removesuffix(".safetensors")
    others = [split_lora(word) for word in usage.loras]
    nodes = "".join(f", Load LoRA {each.name} at strength {each.scale:g}" for each in others)
    tags = "".join(f"<lora:{each.name.removesuffix('.safetensors')}:{each.scale:g}> " for each in others)
    comfy = ("models/loras", f"Load Checkpoint{nodes}, Load LoRA at strength 1, ")
    return program_uses(usage, "CHECKPOINT", comfy, ("models/Lora", f"Write {tags}<lora:{stem}:1> into the prompt; "))


def diffusers_lora_code(usage: Usage) -> str:
    """Return the Python code that loads the folder into its base model and generates an image."""
    name = f', weight_name="{usage.file}"' if usage.file else ""
    return f'{usage.base_code}pipeline.load_lora_weights("{usage.place}"{name})\n{usage.call}'


def peft_code(usage: Usage) -> str:
    """Return the Python code that loads the adapter into its base model and generates an image."""
    network = usage.facts.family.network
    return f"""from peft import PeftModel
{usage.base_code}pipeline.{network} = PeftModel.from_pretrained(pipeline.{network}, "{usage.place}")
{usage.call}"""


KOHYA = Exporter(
    key="kohya",
    title="a LoRA file for ComfyUI, A1111 and diffusers",
    student_kinds=("lora",),
    writes="file",
    write=export_kohya,
    python=kohya_code,
    programs=kohya_programs,
)

DIFFUSERS = Exporter(
    key="diffusers-lora",
    title="a LoRA folder for diffusers",
    student_kinds=("lora",),
    writes="folder",
    write=export_diffusers_lora,
    python=diffusers_lora_code,
    programs=diffusers_lora_programs,
)

PEFT = Exporter(
    key="peft",
    title="a peft adapter folder",
    student_kinds=("lora",),
    writes="folder",
    write=export_peft,
    python=peft_code,
    library="diffusers and peft",
)
