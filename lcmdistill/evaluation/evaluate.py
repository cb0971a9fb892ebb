"""`lcmdistill evaluate`: sweep finished runs over steps and guidance scales, and compute metrics."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lcmdistill.config.guidance import omega_range
from lcmdistill.data.eviction import evict_lru
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.evaluation.latents import TEACHER_STEPS, bucketed_noise, start_noise
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions, evaluated_run, with_protocol
from lcmdistill.evaluation.progress import SweepProgress, measure_image_seconds
from lcmdistill.evaluation.prompts import PromptChoice, choose_prompts
from lcmdistill.evaluation.protocols import deviations
from lcmdistill.evaluation.results import write_sweep
from lcmdistill.evaluation.select import fingerprint, real_sources, select_metrics
from lcmdistill.evaluation.self_consistency import write_curve
from lcmdistill.evaluation.sweep import SamplerPair, Sweep, sweep_run
from lcmdistill.sampling.generate import check_steps, guidance_warning, load_student, sampling_dtype
from lcmdistill.sampling.variations import check_eta
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.device import pick_device
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.logging import progress
from lcmdistill.utils.units import counted, duration_text

logger = logging.getLogger(__name__)

REPORT = 3.0
"seconds of the report and the card's plots after an evaluation"


def evaluate(runs: Sequence[Path], options: EvaluationOptions) -> None:
    """Sweep each run on the same prompts and noise, and write numbers and images to RUN/evaluation.

    Results that exist and are up to date are kept.

    Raises:
        UsageError: The runs cannot be compared, or an option cannot be met.
    """
    evaluated = [evaluated_run(run) for run in runs]
    options = with_protocol(options, cache_root(evaluated[0].config.data) / "protocols")
    resolutions = sorted({run.config.data.resolution for run in evaluated})
    if len(resolutions) > 1:
        raise UsageError(f"the runs generate {resolutions} px and cannot be compared; evaluate each run separately")
    if len({str(run.config.data.buckets) for run in evaluated}) > 1:
        raise UsageError("the runs have different data.buckets and cannot be compared; evaluate each run separately")
    device = pick_device(options.device)
    choice, real, teacher, loaded = None, (), None, None
    for later, run in zip(range(len(evaluated))[::-1], evaluated, strict=True):
        settings = asdict(run.config.teacher)
        if teacher is None or settings != loaded:
            teacher, loaded = load_teacher(**settings), settings
            teacher.to(device)
        if choice is None:
            choice = choose_prompts(evaluated, options, teacher)
            real = real_sources(evaluated, options, choice)
        if run.is_baked and options.guidance_scales not in ((), (run.guidance_scale,)):
            logger.info(
                f"{run.run}: its guidance scale, {run.guidance_scale:g}, is in its weights, so --guidance-scale has no effect"
            )
        scales = _guidance_scales(run, evaluated, options)
        _evaluate_run(run, options, teacher.in_run(run.config), choice, real, scales, device, later)


def _guidance_scales(run: EvaluatedRun, runs: Sequence[EvaluatedRun], options: EvaluationOptions) -> tuple[float, ...]:
    """Return the guidance scales of a run's sweep. Runs that are compared share one, that of a LoRA if there is one."""
    if run.is_baked:
        return (run.guidance_scale,)
    if options.guidance_scales:
        for warning in filter(None, (guidance_warning(run.model, scale) for scale in options.guidance_scales)):
            logger.warning(f"{run.run}: {warning}")
        return options.guidance_scales
    if len(runs) > 1:
        return (next((each.guidance_scale for each in runs if each.is_baked), runs[0].guidance_scale),)
    omegas = omega_range(run.config)
    ends = (omegas.low + 1, omegas.high + 1) if omegas else ()
    return (run.guidance_scale, *(scale for scale in ends if scale != run.guidance_scale))


def _evaluate_run(
    run: EvaluatedRun,
    options: EvaluationOptions,
    teacher: Teacher,
    choice: PromptChoice,
    real: tuple[str, ...],
    scales: tuple[float, ...],
    device: torch.device,
    later: int,
) -> None:
    config, folder, model, prompts = run.config, run.run / "evaluation", run.model, choice.prompts
    resolution, buckets = config.data.resolution, run.bucket_sizes(teacher)
    sizes = tuple(buckets[i % len(buckets)] for i in range(len(prompts))) if buckets else ()
    sweep = Sweep(
        prompts=prompts,
        steps=options.steps,
        guidance_scales=scales,
        resolution=resolution,
        seed=options.seed,
        samplers=("teacher",) if teacher.in_pixels or teacher.is_flow else ("teacher", "trailing"),
        sizes=sizes,
    )
    dtype = sampling_dtype(None, model.precision, device)
    pipeline = load_student(
        model.path, device, model.loras, options=model.options, scheduler=model.scheduler, dtype=dtype
    )
    check_steps(pipeline, max(sweep.steps))
    check_eta(pipeline, options.eta)
    selected = select_metrics(run, options, real, len(prompts), device)
    metrics, metrics_key = selected.metrics, selected.key
    square_noise = lambda: start_noise(teacher, resolution, len(prompts), options.seed)  # noqa: E731
    weights, teacher_fingerprint = fingerprint(run.weight_files()), teacher.fingerprint(with_network=True)
    pair = SamplerPair(
        teacher=teacher,
        pipeline=pipeline,
        student_scale=1.0 if run.is_baked else None,
        noise=bucketed_noise(teacher, sizes, options.seed) if sizes else square_noise(),
        teacher_fingerprint=teacher_fingerprint,
        # The images of a LoRA depend on its base, too.
        student_fingerprint=digest([weights, teacher_fingerprint]) if model.loras else weights,
        dtype=dtype,
        batch_size=options.batch_size,
        device=device_name(device),
        eta=options.eta,
    )
    logger.info(f"{run.run}: {len(prompts)} images, steps {_listed(sweep.steps)}, guidance {_listed(scales)}")
    state = SweepProgress(sweep, measure_image_seconds(pair, prompts), applies_cfg=pair.teacher.applies_cfg)
    points = counted(len(sweep.points()), "combination")
    logger.info(
        f"{counted(state.total, 'image')} in {points} of sampler, steps and guidance: about {duration_text(state.seconds)} "
        "if none is cached"
    )
    cache = cache_root(config.data) / "evaluation"
    with progress(f"evaluating {run.run.name}", state.total) as bar:
        state.show(bar, later * state.student_seconds + REPORT)
        used = sweep_run(folder, cache, sweep, pair, metrics, metrics_key, state)
        used.append(write_curve(folder, cache, sweep, pair))
    evict_lru(cache.parent, config.data.cache_limit * 1e9, used)
    more = {
        "is_baked": run.is_baked,
        "held_out": choice.held_out,
        "prompts_origin": choice.origin,
        "notes": selected.notes,
        "has_classes": bool(teacher.own_prompts),
        "trained_steps": config.optim.max_train_steps,
        **({} if options.eta is None else {"eta": options.eta}),
    }
    if options.published is not None:
        differences = deviations(
            options.published,
            images=len(prompts),
            prompts=len(set(prompts)),
            resolution=resolution,
            steps=sweep.steps,
            teacher=f"{TEACHER_STEPS} steps at guidance scale {scales[0]:g}",
        )
        protocol = options.published.protocol
        more["protocol"] = {"name": protocol.key, "source": protocol.source, "deviations": differences}
    write_sweep(folder, sweep, metrics, more)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def device_name(device: torch.device) -> str:
    """Return the device in words, for the record of the time per image."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type
