"""How long each phase of a run takes, from what its parts take on this device: a forward and a backward pass, the VAE, text.

The parts are measured, a few passes in all. What follows from them are numbers of passes, which the settings decide.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lcmdistill.config.schema import DataConfig, RunConfig
from lcmdistill.data.buckets import buckets_for, largest
from lcmdistill.data.chunks import generated_at_once
from lcmdistill.data.latent_cache import cache_folder, chunk_paths
from lcmdistill.data.sources.base import Source
from lcmdistill.data.sources.registry import is_generated
from lcmdistill.data.survey import SourceReport, members_of
from lcmdistill.data.trajectories import TrajectoryPlan
from lcmdistill.data.transforms import check_sample
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.objectives.base import backward_passes
from lcmdistill.sampling.prompts import STEPS
from lcmdistill.students.student import AutocastNetwork, guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.validation import validation_prompts
from lcmdistill.utils import runtime
from lcmdistill.utils.run_dir import checkpoint_step, checkpoints
from lcmdistill.utils.units import counted

WRITE_RATE = 300e6
"bytes per second at which checkpoints and pipelines are written and hashed, on an ordinary SSD"

SLOW = 5.0
"seconds of one pass after which it is not repeated"


FEW = 2.0
"seconds of passes up to which there are five of them, not three"


@dataclass(frozen=True)
class Rates:
    """Seconds on one device.

    Attributes:
        forward: One forward pass of the network on one sample of a micro-batch.
        backward: The backward pass of the same.
        update: One optimizer step with clipping and the average.
        encode: The VAE's encoder, per image.
        decode: The VAE's decoder, per image.
        caption: The text encoders, per caption.
        generate: One forward pass on one sample of a batch that the teacher generates; None as `forward`.
    """

    forward: float
    backward: float
    update: float
    encode: float
    decode: float
    caption: float
    generate: float | None = None


STARTING, ENCODING_PROMPTS = "starting", "encoding prompts"
GENERATING, ENCODING = "generating latents", "encoding latents"
REFERENCES, TEACHER_OUTPUTS = "reference images", "caching teacher outputs"
TRAINING, VALIDATION, WRITING = "training", "validation", "writing the result"

ORDER = (STARTING, ENCODING_PROMPTS, GENERATING, ENCODING, REFERENCES, TEACHER_OUTPUTS, TRAINING, VALIDATION, WRITING)
"the phases of a run, by name"


@dataclass(frozen=True)
class Phase:
    """One phase of a run: its name, its seconds, and of what they consist."""

    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class SourceSamples:
    """The samples of a source.

    Attributes:
        generated: Whether the teacher generates them.
        total: How many a run prepares.
        cached: How many of these the cache has already.
        read: Seconds in which one is read and cropped.
    """

    generated: bool
    total: int
    cached: int
    read: float = 0.0

    @property
    def missing(self) -> int:
        """How many are prepared by this run."""
        return max(0, self.total - self.cached)


def samples_of(
    sources: Sequence[Source], config: RunConfig, teacher: Teacher, reports: Sequence[SourceReport] | None = None
) -> list[SourceSamples]:
    """Return how many samples each source gives.

    Args:
        sources: The run's sources.
        config: The resolved configuration.
        teacher: The teacher.
        reports: What became of each source's members, if they were looked at.
    """
    found, optim, is_cached = [], config.optim, config.data.cache == "on"
    visited = optim.max_train_steps * optim.batch_size * optim.gradient_accumulation_steps
    for i, source in enumerate(sources):
        limit, members = config.data.max_samples, members_of(source, config.data)
        report = reports[i] if reports else None
        looked_at = report.kept + report.num_rejected if report else 0
        if members is None:  # only reading all of them tells
            members = looked_at if report and report.complete else limit
        share = report.kept / looked_at if report and looked_at else 1.0
        if not is_cached:
            known = members or source.count() or visited // len(sources)
            found.append(SourceSamples(source.is_generated, round(known * share), known))
            continue
        folder = cache_folder(source, config.data, teacher, config.run.seed)
        spans = [path.stem.split("-") for path in chunk_paths(folder, limit)]
        cached = sum(int(end) - int(start) for start, end in spans)
        total = round((members or source.count() or 0) * share)
        found.append(SourceSamples(source.is_generated, total, min(cached, members or 0)))
    return found


def with_read_seconds(
    samples: Sequence[SourceSamples], sources: Sequence[Source], config: DataConfig, teacher: Teacher
) -> list[SourceSamples]:
    """Return the samples of sources with the measured seconds that reading one takes: photos are slower than the VAE.

    Sources on other machines are not read.
    """
    measured = []
    for each, source in zip(samples, sources, strict=True):
        began, count = runtime.clock(), 0
        if each.missing and not each.generated and source.kind != "remote":
            sizes = buckets_for(source, config, teacher.multiple)
            for count, member in enumerate(source.members(READ), start=1):  # noqa: B007
                check_sample(member, config, 0, 0, teacher.rejects, sizes)
                if runtime.clock() - began > SLOW:
                    break
        measured.append(replace(each, read=(runtime.clock() - began) / count if count else 0.0))
    return measured


READ = 8
"how many images are read for it"


def measure_rates(
    config: RunConfig, teacher: Teacher, device: torch.device, dtype: torch.dtype, trainable: int
) -> Rates:
    """Measure what the parts of a run take. The teacher must be on the device.

    Args:
        config: The resolved configuration.
        teacher: The teacher.
        device: The device of the run.
        dtype: The dtype of autocast.
        trainable: The number of trained parameters.
    """
    batch, size = config.optim.batch_size, largest(config.data, teacher.multiple)
    module = AutocastNetwork(teacher.network, teacher.call, dtype)
    z, t, c = teacher.example(batch, size, device)
    forward = _forward(module, (z, t, c.values, None))
    height, width = (size, size) if isinstance(size, int) else size
    pixels, latent = torch.zeros(1, 3, height, width, device=device), torch.zeros_like(z[:1])
    passed = _seconds(forward)
    both = _forward_backward(config, module, (z, t, c.values, None), passed)
    backward = max(both - passed, 0.5 * passed) + (passed if config.run.gradient_checkpointing else 0.0)
    adapter = ADAPTER if config.student.kind == "lora" else 1.0
    is_latent, generate = not teacher.in_pixels, None
    if any(map(is_generated, config.data.sources)) and not config.objective.info.prompts_only:
        at_once = generated_at_once(height, width) * (2 if teacher.applies_cfg else 1)
        some, t, c = teacher.example(at_once, size, device)
        generate = _seconds(_forward(module, (some, t, c.values, None))) / at_once
    return Rates(
        forward=passed / batch,
        backward=adapter * backward / batch,
        update=trainable * UPDATE_BYTES / _copy_rate(device),
        encode=_seconds(lambda: float(teacher.encode_images(pixels)[0].sum())) if is_latent else 0.0,
        decode=_seconds(lambda: float(teacher.decode(latent).sum())) if is_latent else 0.0,
        caption=_seconds(lambda: teacher.encode_prompts([""] * 8)) / 8 if is_latent else 0.0,
        generate=generate,
    )


def _forward(module: AutocastNetwork, inputs: tuple) -> Callable[[], None]:
    """Return a function that makes a forward pass."""

    def forward() -> None:
        with torch.no_grad():
            float(module(*inputs).sum())

    return forward


ADAPTER = 1.35
"a pass with a LoRA on a network takes so much of a pass without one"

UPDATE_BYTES = 4 * 13
"bytes that a step moves per trained number: AdamW seven times, clipping three, the average three, 4 bytes each"


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a call: the median of up to five after a first one, or of the first one alone if it is slow."""
    times = []
    while len(times) < 4 or (len(times) < 6 and sum(times) < FEW):
        began = runtime.clock()
        run()
        times.append(runtime.clock() - began)
        if times[-1] > SLOW:
            return times[-1]
    return statistics.median(times[1:])


def _forward_backward(config: RunConfig, module: AutocastNetwork, inputs: tuple, forward: float) -> float:
    """Return the seconds of a forward and a backward pass; by a factor where the device has no room, or is slow."""
    is_lora = config.student.kind == "lora"
    factor = 1 + ADAPTER if is_lora else 3.0
    if forward > SLOW:
        return factor * forward
    z, t, c, w = inputs
    parameters = [] if is_lora else list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    z = z.clone().requires_grad_(True)

    def both() -> None:
        out = module(z, t, c, w)
        gradients = torch.autograd.grad(out.square().sum(), [z, *parameters], allow_unused=True)
        float(next(each for each in gradients if each is not None).sum())

    try:
        return _seconds(both)
    except (torch.OutOfMemoryError, MemoryError):
        return factor * forward
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _copy_rate(device: torch.device) -> float:
    """Return how many bytes per second the device's memory reads and writes."""
    a = torch.ones(2**22, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / max(_seconds(lambda: float(b.copy_(a)[0])), 1e-9)


def phases(
    config: RunConfig,
    teacher: Teacher,
    samples: Sequence[SourceSamples],
    rates: Rates,
    *,
    written: float,
    world: int = 1,
) -> list[Phase]:
    """Return the phases of a run in their order.

    Args:
        config: The resolved configuration.
        teacher: The teacher.
        samples: The samples of each source.
        rates: What the parts take.
        written: Bytes of a checkpoint and of the trained student, which are written at the end.
        world: The number of processes.
    """
    data, run, optim = config.data, config.run, config.optim
    generated = sum(each.missing for each in samples if each.generated) / world
    encoded = sum(each.missing for each in samples if not each.generated) / world
    reading = sum(each.missing * each.read for each in samples) / world
    plan, applies_cfg = TrajectoryPlan.of(config), teacher.applies_cfg and data.guidance_scale > 1
    per_image = (rates.generate or rates.forward) * (
        plan.forwards(teacher) if plan else (2 if applies_cfg else 1) * data.teacher_steps
    )
    found = []
    if config.objective.info.prompts_only:
        found.append(Phase(ENCODING_PROMPTS, generated * rates.caption, counted(math.ceil(generated), "prompt")))
        generated = 0
    if generated:
        note = f"{counted(math.ceil(generated), 'image')} of {counted(data.teacher_steps, 'step')} by the teacher"
        if plan is not None:
            note = f"{math.ceil(generated):,} trajectories of {plan.points} states by the teacher"
        found.append(Phase(GENERATING, generated * (per_image + rates.caption), note))
    if encoded:
        seconds = encoded * (rates.encode + rates.caption) + reading
        found.append(Phase(ENCODING, seconds, counted(math.ceil(encoded), "image")))
    prompts = len(validation_prompts(config, teacher))
    left = steps_left(config)
    # A run that has taken steps has generated them already.
    if run.validate_every and left == optim.max_train_steps and config.objective.info.start != "student":
        scale = run.validation_guidance_scale or 1.0
        applies_cfg = teacher.applies_cfg and (scale > 1 or config.objective.omega != "none")
        forwards = TEACHER_STEPS * (2 if applies_cfg else 1)
        seconds = prompts * (forwards * rates.forward + rates.decode)
        found.append(Phase(REFERENCES, seconds, f"{prompts} by the teacher in {TEACHER_STEPS} steps; cached"))
    of_step = dict(config.objective.num_forwards)
    if not teacher.applies_cfg and "teacher" in of_step:
        of_step["teacher"] = -(-of_step["teacher"] // 2)
    if data.teacher_cache_samples:
        outputs = data.teacher_cache_samples * of_step.pop("teacher", 0) * sum(each.total for each in samples) / world
        found.append(Phase(TEACHER_OUTPUTS, outputs * rates.forward, f"{math.ceil(outputs):,} outputs"))
    backwards = sum(backward_passes(config.objective).values())
    adapter = ADAPTER if config.student.kind == "lora" else 1.0
    bare, adapted = of_step.pop("teacher", 0), sum(of_step.values())
    sample = (bare + adapter * adapted) * rates.forward + backwards * rates.backward
    if data.cache == "off":
        sample += rates.caption + (0.0 if config.objective.info.prompts_only else rates.encode)
    step = optim.gradient_accumulation_steps * optim.batch_size * sample + rates.update
    found.append(Phase(TRAINING, left * step, f"{counted(left, 'step')} of {step:.3g} s"))
    if count := validations_left(config, optim.max_train_steps - left):
        baked = guidance_of(teacher, config.student, config.objective.omega) != "free"
        steps = [n for n in STEPS if n <= teacher.schedule.num_steps]
        grids = count * GRID
        image = sum(steps) * rates.forward * (1 if baked else 2) + len(steps) * (rates.decode + rates.caption)
        found.append(Phase(VALIDATION, count * prompts * image + grids, f"{count} x {prompts} prompts"))
    found.append(Phase(WRITING, written / WRITE_RATE + REPORT, "student, card and report"))
    return found


REPORT, GRID = 2.0, 0.5
"seconds of the report and the card, and of drawing the grid of a validation"


def steps_left(config: RunConfig) -> int:
    """Return how many steps a run has to take: those after its last checkpoint."""
    saved = checkpoints(Path(config.run.output or "") / "checkpoints")
    return max(0, config.optim.max_train_steps - (checkpoint_step(saved[-1]) if saved else 0))


def validations(config: RunConfig, after: int) -> int:
    """Return how many validations a run makes after a step; the one before training is not counted."""
    every, total = config.run.validate_every, config.optim.max_train_steps
    return math.ceil(total / every) - after // every if every else 0


def validations_left(config: RunConfig, done: int) -> int:
    """Return how many validations a run makes that has done some steps; one before training is counted, too."""
    return validations(config, done) + (config.run.validate_every > 0 and not done)


@dataclass
class TimeLeft:
    """What a run still takes: its steps, its validations, and writing the result.

    Attributes:
        config: The resolved configuration.
        validation: Seconds of the last validation; before the first one, an estimate.
        writing: Estimated seconds of writing the result.
    """

    config: RunConfig
    validation: float = 0.0
    writing: float = 0.0

    def seconds(self, step: int, per_step: float) -> float:
        """Return the seconds left once a step is done, whose validation is still ahead."""
        steps = self.config.optim.max_train_steps - step
        return steps * per_step + validations(self.config, step - 1) * self.validation + self.writing
