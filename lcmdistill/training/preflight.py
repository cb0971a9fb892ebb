"""Checks before a run: the settings against the teacher, the data, the memory, and the time that it takes."""

import dataclasses
import logging
from pathlib import Path

import torch

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig, TeacherConfig
from lcmdistill.config.toml import flatten, settings_to_toml
from lcmdistill.data.buckets import bucket_sizes
from lcmdistill.data.latent_cache import cache_folder, check_cache
from lcmdistill.data.sources.registry import is_generated
from lcmdistill.data.stream import check_stream
from lcmdistill.data.survey import survey, unused_samples
from lcmdistill.data.teacher_cache import check_teacher_cache
from lcmdistill.data.trajectories import check_trajectory
from lcmdistill.diffusion.lpips import perceptual_distance
from lcmdistill.objectives import OBJECTIVES, method_sampled_by
from lcmdistill.students.lora import check_layers
from lcmdistill.students.quantize import check_quantization
from lcmdistill.students.student import guidance_of
from lcmdistill.students.warm_start import check_start
from lcmdistill.teachers.base import Teacher, has_omega_input, supports_omega_input
from lcmdistill.teachers.downloads import Download, check_downloads, pending_downloads
from lcmdistill.teachers.family import needs_caption
from lcmdistill.teachers.loading import checkpoint_summary, load_teacher
from lcmdistill.teachers.lora.fuse import check_files, check_low_rank
from lcmdistill.teachers.naming import ALIASES
from lcmdistill.teachers.registry import family_of_folder
from lcmdistill.training.cost_disk import check_space
from lcmdistill.training.cost_time import WRITE_RATE
from lcmdistill.training.memory.plan import plan_memory
from lcmdistill.training.optimizer import check_optimizer
from lcmdistill.training.run_data import sources_of
from lcmdistill.training.run_settings import check_run, resolve_run_defaults
from lcmdistill.training.sharding import check_sharding
from lcmdistill.training.summary import estimate_cost, log_summary, output_text
from lcmdistill.utils import runtime
from lcmdistill.utils.device import free_memory, pick_device
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.launch import num_processes, process_index
from lcmdistill.utils.trackers import check_tracker

logger = logging.getLogger(__name__)

SURVEY_SECONDS = 20.0


def validate_for_teacher(config: RunConfig, teacher: Teacher) -> None:
    """Raise UsageError for a setting that is impossible with this teacher."""
    try:
        config.objective.check(teacher.schedule.num_steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_teacher_cache(config.objective, config.data.teacher_cache_samples)
    check_trajectory(config, teacher, is_generated=all(map(is_generated, config.data.sources)))
    _check_start(config, teacher)
    if config.student.kind not in teacher.family.student_kinds:
        raise UsageError(
            f"a full student of {teacher.family.title} is not supported, because of its size; use lcmdistill distill-lora"
        )
    if teacher.family.embeds_guidance:
        _check_embedded_guidance(config, teacher)
    check_start(config.student.start, config.student)
    if config.student.kind == "lora" and config.student.start == "scratch":
        raise UsageError(
            "student.start is scratch, but a LoRA is an addition to the teacher's weights; use lcmdistill distill"
        )
    if config.data.buckets is not None:
        _check_buckets(config, teacher)
    if config.objective.info.prompts_only and teacher.condition_is_random:
        raise UsageError(
            f"--objective {config.objective_name} learns from prompts alone, and an inpainting model needs images to mask; use "
            "--objective lcm"
        )
    if teacher.in_pixels:
        _check_pixels(config, teacher)
    if config.student.kind == "lora":
        check_layers(teacher.network, config.student)
    if config.student.lora_relative_to == "base":
        check_low_rank(config.teacher.loras or ())
    scale = config.run.validation_guidance_scale
    if scale not in (None, 1.0) and guidance_of(teacher, config.student, config.objective.omega) == "baked":
        logger.warning(
            f"run.validation_guidance_scale is {scale:g}, but the student's guidance is in its weights: validation applies CFG "
            "on top of it, and so does sample; remove the setting, or use 1"
        )
    omegas = omega_range(config)
    is_baked = config.student.kind == "lora" or config.objective.omega == "baked"
    has_input = supports_omega_input(teacher.network) or teacher.in_pixels or is_baked
    if not has_input and omegas and omegas.low != omegas.high:
        raise UsageError(
            f"omega is sampled from {omegas.low:g} to {omegas.high:g}, but a {type(teacher.network).__name__} has no omega "
            "input; set objective.w_min and objective.w_max to the same value"
        )
    _check_sizes(config, teacher)


def _check_sizes(config: RunConfig, teacher: Teacher) -> None:
    """Raise UsageError for a resolution or a bucket that the teacher cannot generate."""
    resolution, patch, multiple = config.data.resolution, teacher.network.config.get("patch_size", 1), teacher.multiple
    if not teacher.in_pixels and resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise UsageError(
            f"data.resolution is {resolution}; it must be a multiple of {multiple} (the VAE's factor is {teacher.vae_factor}"
            f"{f', a patch has {patch}' if patch > 1 else ''}, and diffusers generates multiples of "
            f"{teacher.family.pipeline_multiple}); try {near}"
        )
    if (most := teacher.largest_side) is None:
        return
    sides = {"data.resolution": resolution}
    sides |= {
        f"data.buckets {height}x{width}": max(height, width) for height, width in bucket_sizes(config.data, multiple)
    }
    for name, side in sides.items():
        if side > most:
            raise UsageError(
                f"{name} has a side of {side} px, and the teacher's table of positions covers {most} px; use a smaller size"
            )


def _check_embedded_guidance(config: RunConfig, teacher: Teacher) -> None:
    """Raise UsageError for settings of classifier-free guidance with a teacher that takes guidance as an input."""
    omegas, title = omega_range(config), teacher.family.title
    if getattr(config.objective, "guidance", "baked") == "free":
        raise UsageError(
            f"--guidance free trains for classifier-free guidance, and {title} takes its guidance scale as an input instead; "
            "remove this option"
        )
    if omegas is None:
        methods = [name for name, each in OBJECTIVES.items() if hasattr(each, "w_min") and each.info.start == "teacher"]
        raise UsageError(
            f"--objective {config.objective_name} has no setting for guidance, and {title} needs one as an input; use "
            f"{', '.join(methods[:-1])} or {methods[-1]}"
        )
    if omegas.low != omegas.high:
        raise UsageError(
            f"the guidance scale is {omegas.scale}, and {title} takes one fixed scale as an input; set objective.w_min and "
            "objective.w_max to the same value, the scale minus 1"
        )
    if config.data.teacher_cache_samples:
        raise UsageError(
            f"data.teacher_cache_samples caches outputs for classifier-free guidance, which {title} does not have; use 0"
        )


def _check_buckets(config: RunConfig, teacher: Teacher) -> None:
    """Raise UsageError for buckets that are impossible or have no effect."""
    if config.data.teacher_cache_samples:
        raise UsageError(
            "data.teacher_cache_samples caches teacher outputs of one size; set it to 0, or remove data.buckets"
        )
    if teacher.in_pixels:
        raise UsageError(
            "data.buckets is for latent models, and a pixel-space teacher has one size; remove data.buckets"
        )
    if config.objective.info.prompts_only:
        raise UsageError(
            "data.buckets is for images, and this objective learns from prompts alone; remove data.buckets"
        )
    if all(map(is_generated, config.data.sources)):
        raise UsageError(
            "data.buckets is for your own images, and --data teacher generates squares; remove data.buckets"
        )
    bucket_sizes(config.data, teacher.multiple)


def _check_pixels(config: RunConfig, teacher: Teacher) -> None:
    """Raise UsageError for a setting that is meaningless for a pixel-space network."""
    size, resolution = teacher.network.config.sample_size, config.data.resolution
    if resolution != size:
        raise UsageError(
            f"data.resolution is {resolution}, but this pixel-space teacher has {size} pixels; pass --resolution {size}"
        )
    if config.student.kind == "lora":
        raise UsageError(
            "LoRA is not supported for pixel-space teachers, because no program reads one; use lcmdistill distill"
        )
    if "pixel" not in config.objective.info.spaces:
        *others, last = [name for name, each in OBJECTIVES.items() if "pixel" in each.info.spaces]
        raise UsageError(
            f"--objective {config.objective_name} is for latent models; in pixel space use {', '.join(others)} or {last}"
        )
    # Loaded here for its errors, before data are prepared.
    if weights := getattr(config.objective, "lpips_weights", None):
        perceptual_distance(weights, torch.device("cpu"))


def _check_start(config: RunConfig, teacher: Teacher) -> None:
    """Raise UsageError unless the method can start from this model: a teacher, or an LCM for fine-tuning."""
    sampled_by, model = type(teacher.pipeline.scheduler).__name__, config.teacher.model
    info, method = teacher.method(config.objective.info), method_sampled_by(sampled_by)
    is_student = method is not None or has_omega_input(teacher.network)
    if info.start == "student":
        if not is_student or (method is not None and method.scheduler != info.scheduler):
            why = (
                f"is a {method.title}, which learned another map"
                if method is not None
                else f"is none: it has neither an omega input nor the scheduler {info.scheduler}"
            )
            raise UsageError(
                f"--objective {info.key} fine-tunes an LCM, and {model} {why}; name a run of lcmdistill, or an LCM's pipeline"
            )
        if config.objective.omega == "none" and has_omega_input(teacher.network):
            raise UsageError(
                f"--guidance free, but {model} has an omega input: its guidance is in its weights; remove --guidance"
            )
        if config.student.start != "teacher":
            raise UsageError(
                f"student.start is {config.student.start}, but --objective {info.key} fine-tunes an LCM; remove student.start"
            )
        if any(map(is_generated, config.data.sources)):
            raise UsageError(f"--objective {info.key} trains on your own images; pass them with --data")
    elif is_student:
        raise UsageError(
            f"{model} is already a few-step model and has no ODE to distill; pass its original teacher"
            f"{'' if teacher.in_pixels else ', or fine-tune an LCM with --objective lcf'}"
        )
    if getattr(config.objective, "distance", "") == "lpips" and not teacher.in_pixels:
        raise UsageError(
            "objective.distance is lpips, which compares images, but this teacher works on latents; try huber"
        )


def check_early(config: RunConfig) -> None:
    """Check what needs no teacher: the folder, the device, and whether there is any usable data.

    Logs what a single-file teacher was detected as, and what will be downloaded.

    Raises:
        UsageError: A check fails.
    """
    # The main process only: another process may look when this one has already written to the folder.
    if process_index() == 0:
        check_run(config)
        check_tracker(config.run.report_to)
        if summary := checkpoint_summary(config.teacher.model, config.teacher.prediction_type):
            logger.info(summary)
    check_optimizer(config.optim, pick_device(config.run.device))
    check_quantization(config.student.quantize_base)
    check_sharding(config, pick_device(config.run.device))
    check_cache(config.data)
    check_stream(config.data, sources_of(config))
    check_files(config.teacher.loras or ())  # before anything is downloaded
    rejects = needs_caption if _takes_prompts(config.teacher.model) else lambda caption: None
    survey(sources_of(config), config.data, config.run.seed, seconds=60.0, first_only=True, rejects=rejects)
    if process_index() == 0 and (line := check_downloads(_downloads(config.teacher))):
        logger.info(line)


def _downloads(teacher: TeacherConfig) -> list[Download]:
    others = (teacher.vae, *(teacher.text_encoder or ()), teacher.base)
    return pending_downloads(
        teacher.model, revision=teacher.revision, variant=teacher.variant, drop=teacher.drop, others=others
    )


def _takes_prompts(model: str) -> bool:
    """Return whether images need captions; False where that is unknown before the teacher is loaded, as for a hub id."""
    if model in ALIASES:
        return True
    try:
        folder = Path(model).expanduser()
        family = family_of_folder(folder)
        if family is None:
            return folder.exists()
        config = parse_json((folder / family.network / "config.json").read_text(encoding="utf-8"))
        return family.takes_captions(config)
    except (OSError, ValueError, AttributeError):
        return Path(model).expanduser().exists()


def _num_bytes(teacher: Teacher) -> int:
    parts = [part for part in teacher.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(each.numel() * each.element_size() for part in parts for each in part.parameters())


def dry_run(config: RunConfig, *, full: bool = False, began: float | None = None) -> None:
    """Open the teacher and the data, and log what a run would do and cost.

    Args:
        config: The requested configuration.
        full: Whether to log all settings as TOML, too.
        began: When the command began, by `runtime.clock`; by default now.

    Raises:
        UsageError: The run would be refused, such as for want of disk space.
    """
    world = num_processes()
    if process_index() != 0:  # the first process reports for all
        return
    began = runtime.clock() if began is None else began
    device = pick_device(config.run.device)
    downloads = _downloads(config.teacher)
    before = runtime.clock()
    teacher = load_teacher(**dataclasses.asdict(config.teacher))
    # A run after this one finds what was downloaded, and only reads it.
    downloading = max(0.0, runtime.clock() - before - _num_bytes(teacher) / WRITE_RATE) if downloads else 0.0
    config = resolve_run_defaults(config, world, teacher)
    check_run(config)
    validate_for_teacher(config, teacher)
    teacher = teacher.in_run(config)
    plan = plan_memory(config, teacher, device, free=free_memory(device), world=world, loud=True)
    config = plan.config if plan else config
    logger.info(output_text(config))
    buckets = ", with aspect-ratio buckets" if config.data.buckets else ""
    logger.info(f"resolution = {config.data.resolution} pixels{buckets}")
    seed = config.run.seed
    sources = sources_of(config, teacher)
    started = runtime.clock() - began - downloading
    reports = survey(sources, config.data, seed, seconds=SURVEY_SECONDS, rejects=teacher.rejects, teacher=teacher)
    for source, report in zip(sources, reports, strict=True):
        ready = len(list(cache_folder(source, config.data, teacher, seed).glob("*.safetensors")))
        cached = f"; {ready} cached chunks are ready" if ready else ""
        unused = unused_samples(source, config.data, report, takes_prompts=not teacher.in_pixels)
        logger.info(f"data {source.label}: {report}{unused}{cached}")
    cost = estimate_cost(config, teacher, sources, device, plan=plan, reports=reports, world=world, started=started)
    log_summary(config, teacher, cost, plan, world=world)
    if full:
        logger.info(settings_to_toml(flatten(config)))
    check_space(cost.items)
    logger.info(f"dry run: nothing was written{'' if full else '; add --full for all settings'}")
