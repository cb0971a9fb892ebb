"""`lcmdistill evaluate`: who is measured, on which prompts, at which steps and guidance, by which measures."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.recorded import run_takes_omega
from lcmdistill.config.schema import DataConfig, RunConfig
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.data.sources.registry import is_generated, make_source
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.evaluation.latents import start_noise, student_latents
from lcmdistill.evaluation.metrics.features import MobileNetV2Features, ScriptedFeatures, features_of, has_mobilenet
from lcmdistill.evaluation.metrics.measures import FREE, Measure, check_count, kid_measure
from lcmdistill.evaluation.metrics.pretrained import FID_IMAGES, clip_measure, fid_measure, lpips_measure
from lcmdistill.evaluation.results import write_sweep
from lcmdistill.evaluation.self_consistency import curve
from lcmdistill.evaluation.sweep import SamplerPair, Sweep, SweepPoint, digest, sweep_run
from lcmdistill.objectives.recorded import has_trained_student, require_run_config
from lcmdistill.sampling.generate import ModelToSample, check_steps, find_model, load_student
from lcmdistill.sampling.prompts import default_prompts
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.naming import resolve_alias
from lcmdistill.utils.device import compute_dtype, pick_device
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.logging import progress

logger = logging.getLogger(__name__)

SEED = 2026

STEPS = (1, 2, 4, 8)

IMAGES, IMAGES_OF_SMALL = 16, 32
"in each cell where nobody says how many: minutes on a GPU for the large ones, minutes on two cores for the small ones"

SMALL = 50_000_000
"parameters below which a network is quick enough for more images"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What was asked for; None and () are what a run itself suggests.

    prompts: a file; num_images: drawn in each cell; real: a data source of real images; features, inception, lpips: files;
    clip, scorer: folders or cached hub ids.
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
    clip: str | None = None
    lpips: Path | None = None
    scorer: str | None = None


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run. guidance_scale: what it recommends, in the teacher's terms: of a LoRA what it was trained with."""

    run: Path
    config: RunConfig
    found: ModelToSample

    @property
    def is_baked(self) -> bool:
        """Whether its guidance is in its weights: a LoRA's, and a network's without an input for it."""
        index = self.run / "pipeline" / "model_index.json"
        if not self.found.loras and "ConsistencyModelPipeline" in index.read_text(encoding="utf-8").split('"'):
            return True
        return omega_range(self.config) is not None and not run_takes_omega(self.run)

    @property
    def guidance_scale(self) -> float:
        """The one it is judged at first."""
        omegas = omega_range(self.config)
        if self.is_baked:
            return omegas.middle if omegas else 1.0
        return float(self.found.guidance_scale or 1.0)

    def files(self) -> list[Path]:
        """The weights that it draws with."""
        if self.found.loras:
            return [Path(path) for path in self.found.loras]
        return sorted((self.run / "pipeline").rglob("*.safetensors"))


def evaluated_run(run: Path) -> EvaluatedRun:
    """A run to be measured. Raises UsageError if it is none, or has not finished."""
    config = require_run_config(run)
    if config.objective.info.start == "student":
        raise UsageError(
            f"{run} was fine-tuned without a teacher, and there is nothing to measure it against; sample it"
        )
    if not has_trained_student(run):
        raise UsageError(f"the run {run} has not finished; run its command again first")
    return EvaluatedRun(run, config, find_model(str(run)))


def evaluate(runs: Sequence[Path], wish: EvaluationOptions) -> None:
    """Sweep each run, on the same prompts and noise, and leave its numbers and pictures in RUN/evaluation.

    What is there from before, drawn alike, is not drawn again. Raises UsageError for what the user can mend.
    """
    subjects = [evaluated_run(run) for run in runs]
    resolutions = sorted({s.config.data.resolution for s in subjects})
    if len(resolutions) > 1:
        raise UsageError(f"the runs draw at {resolutions} px and cannot be compared; evaluate each by itself")
    device = pick_device(wish.device)
    wish = replace(wish, real=real_source(subjects, wish))
    prompts, teacher, before = (), None, None
    for each in subjects:
        settings = asdict(each.config.teacher)
        if teacher is None or settings != before:
            teacher, before = load_teacher(**settings), settings
            teacher.to(device)
        prompts = prompts or chosen_prompts(subjects, wish, teacher)
        if each.is_baked and wish.guidance_scales not in ((), (each.guidance_scale,)):
            logger.info(
                f"{each.run}: its guidance, {each.guidance_scale:g}, is in its weights, and --guidance-scale cannot change it"
            )
        _evaluate_one(each, wish, teacher, prompts, _guidance(each, subjects, wish), device)


def _guidance(each: EvaluatedRun, subjects: Sequence[EvaluatedRun], wish: EvaluationOptions) -> tuple[float, ...]:
    """The guidance scales of a run's sweep; runs that are compared are drawn at one, a LoRA's where there is one."""
    if each.is_baked:
        return (each.guidance_scale,)
    if wish.guidance_scales:
        return wish.guidance_scales
    own = each.guidance_scale
    if len(subjects) > 1:
        return (next((s.guidance_scale for s in subjects if s.is_baked), subjects[0].guidance_scale),)
    omegas = omega_range(each.config)
    ends = (omegas.low + 1, omegas.high + 1) if omegas else ()
    return (own, *(scale for scale in ends if scale != own))


def chosen_prompts(subjects: Sequence[EvaluatedRun], wish: EvaluationOptions, teacher: Teacher) -> tuple[str, ...]:
    """A prompt for each image, held out of training; a short set is spread over the file, a long one goes round it.

    Prompts that any of the runs is known to have learnt on are left out. A network that knows classes alone is asked for
    each of them, and one without prompts for nothing. Raises UsageError if none is left.
    """
    parameters = sum(p.numel() for p in teacher.network.parameters())
    count = wish.num_images or (IMAGES_OF_SMALL if parameters < SMALL else IMAGES)
    if teacher.in_pixels and wish.prompts is None:
        names = default_prompts(None, teacher.network)
        return tuple(names[i % len(names)] for i in range(count))
    own = Path(resolve_alias(subjects[0].config.teacher.model)) / "prompts-heldout.txt"
    bundled = Path(__file__).parent.parent / "assets" / "prompts-heldout.txt"
    path = wish.prompts or str(own if own.is_file() else bundled)
    drew = [each.config.data.prompts for each in subjects if any(map(is_generated, each.config.data.sources))]
    known = {prompt for file in drew for prompt in read_prompts(file)}
    asked = read_prompts(path)
    prompts = [prompt for prompt in asked if prompt not in known]
    if not prompts:
        who = "the run was" if len(subjects) == 1 else "the runs were"
        raise UsageError(f"--prompts {path}: {who} trained on every one of them; give others")
    if len(prompts) < len(asked):
        logger.info(f"{len(asked) - len(prompts)} of {len(asked)} prompts were trained on and are left out")
    return tuple(prompts[i * len(prompts) // count if count < len(prompts) else i % len(prompts)] for i in range(count))


def _evaluate_one(
    each: EvaluatedRun,
    wish: EvaluationOptions,
    teacher: Teacher,
    prompts: tuple[str, ...],
    scales: tuple[float, ...],
    device: torch.device,
) -> None:
    config, folder = each.config, each.run / "evaluation"
    resolution = config.data.resolution
    sweep = Sweep(
        prompts=prompts,
        steps=wish.steps,
        guidance_scales=scales,
        resolution=resolution,
        seed=wish.seed,
        samplers=("teacher",) if teacher.in_pixels else ("teacher", "trailing"),
    )
    found = each.found
    pipeline = load_student(found.path, device, found.loras, options=found.options, scheduler=found.scheduler)
    check_steps(pipeline, max(sweep.steps))
    measures, about = chosen_measures(each, wish, len(prompts))
    who = SamplerPair(
        teacher=teacher,
        pipeline=pipeline,
        student_scale=1.0 if each.is_baked else None,
        noise=start_noise(teacher, resolution, len(prompts), wish.seed),
        teacher_fingerprint=teacher.fingerprint(with_network=True),
        student_fingerprint=fingerprint(each.files()),
        dtype=compute_dtype("auto", device),
        batch_size=wish.batch_size,
        device=device_name(device),
    )
    logger.info(f"{each.run}: {len(prompts)} images, steps {_listed(sweep.steps)}, guidance {_listed(scales)}")
    logger.info(f"{len(sweep.cells())} cells, {sweep.evaluations} network evaluations, {_estimate(who, sweep)}")
    cache = cache_root(DataConfig(cache_dir=config.data.cache_dir)) / "evaluation"
    with progress("evaluating", sweep.evaluations) as bar:
        done, last = [0], [""]

        def tell(cell: SweepPoint, images: int) -> None:
            done[0] += images * cell.evaluations
            bar.update(done[0], cell.name)
            if not bar.visible and cell.name != last[0]:
                logger.info(f"drawing {cell.name}")
                last[0] = cell.name

        sweep_run(folder, cache, sweep, who, measures, about, tell)
        curve(folder, cache, sweep, who)
    more = {
        "is_baked": each.is_baked,
        "held_out": not teacher.in_pixels,
        "has_classes": bool(teacher.own_prompts),
        "trained_steps": config.optim.max_train_steps,
    }
    write_sweep(folder, sweep, measures, more)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _estimate(who: SamplerPair, sweep: Sweep) -> str:
    """How long the sweep takes if nothing of it is there, from two passes of one batch of which the second is timed."""
    n = min(who.batch_size, len(sweep.prompts))
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        student_latents(
            who.pipeline, sweep.prompts[:n], who.noise[:n], steps=1, guidance_scale=1.0, seed=0, batch_size=n
        )
        seconds = time.perf_counter() - began
    minutes = seconds / n * sweep.evaluations / 60
    return f"about {minutes:.0f} minutes" if minutes > 1.5 else "about a minute"


def device_name(device: torch.device) -> str:
    """What an image's time was taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of files' contents."""
    found = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as handle:
            found.update(hashlib.file_digest(handle, "blake2b").digest())
    return found.hexdigest()


def chosen_measures(
    each: EvaluatedRun, wish: EvaluationOptions, count: int
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """The measures that can be taken here, and everything that decides what they give.

    Raises UsageError for one that was asked for and says nothing of so few images.
    """
    measures = {name: measure for name, measure in FREE.items() if count >= measure.least}
    files = [wish.features, wish.inception, wish.lpips]
    about: dict[str, Any] = {"files": [fingerprint([path]) if path and path.is_file() else None for path in files]}
    about |= {"models": [wish.clip, wish.scorer]}
    source = wish.real
    network = None
    if wish.features is not None:
        network = (ScriptedFeatures(wish.features, "--features"), wish.features.stem)
    elif has_mobilenet():
        network = (MobileNetV2Features(), "MobileNetV2")
    if source and network:
        real = real_images(source, each.config.data.resolution, 2 * count)
        measures["kid"] = kid_measure(*network, features_of(network[0], real), f"{len(real)} real images of {source}")
        about["real"] = [source, len(real), digest(real.mean((1, 2, 3)).tolist())]
    elif wish.features:
        raise UsageError("--features is for KID to real images, and no run here has any; name some with --real")
    if wish.inception is not None:
        measures["fid"] = _fid(each, wish, count, source)
    if wish.clip is not None:
        measures["clip"] = clip_measure(wish.clip)
    if wish.lpips is not None:
        measures["lpips"] = lpips_measure(wish.lpips)
    if wish.scorer is not None:
        measures["score"] = clip_measure(wish.scorer, scorer=True)
    for name in measures:
        check_count(measures[name], count)
    return measures, about


def _fid(each: EvaluatedRun, wish: EvaluationOptions, count: int, source: str | None) -> Measure:
    assert wish.inception is not None
    if count < FID_IMAGES:
        raise UsageError(
            f"--inception: FID needs at least {FID_IMAGES} images and {count} are to be drawn: of fewer it is mostly "
            f"bias; pass --num-images {FID_IMAGES}, or go by KID"
        )
    if source is None:
        raise UsageError("--inception: FID needs real images, and the run has none; name some with --real")
    network = ScriptedFeatures(wish.inception, "--inception")
    real = real_images(source, each.config.data.resolution, max(count, FID_IMAGES))
    return fid_measure(network, wish.inception.stem, features_of(network, real), source)


def real_source(subjects: Sequence[EvaluatedRun], wish: EvaluationOptions) -> str | None:
    """Where real images are, the same for all runs: what was named, or the first of their data that holds any."""
    if wish.real is not None:
        return wish.real
    return next((spec for each in subjects for spec in each.config.data.sources if _holds_images(spec)), None)


def _holds_images(spec: str) -> bool:
    """Whether a run's data are images that are still there; nothing is downloaded, and no command run again, for them."""
    try:
        source = make_source(spec)
        return not (source.is_remote or source.is_generated)
    except UsageError:
        return False


def real_images(source: str, resolution: int, count: int) -> Tensor:
    """Real images spread evenly over a data source, or over its beginning, in [0, 1], (at most count, 3, H, W)."""
    data = DataConfig(resolution=resolution)
    try:
        members = list(make_source(source).members(32 * count))
    except UsageError as error:
        told = str(error).replace("--data", "--real").replace("tiny, or teacher to train without a data set", "or tiny")
        raise UsageError(told) from error
    every = max(1, len(members) // count)
    outcomes = (check_sample(replace(member, caption="real"), data, 0, i) for i, member in enumerate(members[::every]))
    pixels = (o.pixels for o in outcomes if isinstance(o, Sample) and o.pixels is not None)
    found = list(islice(pixels, count))
    if len(found) < 2:
        raise UsageError(f"--real {source} holds no images; name an image folder or shards")
    return (torch.stack(found) + 1) / 2
