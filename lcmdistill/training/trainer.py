"""One run from its first step to its outputs."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.eviction import evict_lru
from lcmdistill.data.latent_cache import cache_folder, cache_root
from lcmdistill.data.loader import batch_of, read_ahead
from lcmdistill.data.sampler import SampleOrder
from lcmdistill.data.survey import unused_samples
from lcmdistill.data.teacher_cache import cached_noise_index
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch, Networks, x0_eps_network
from lcmdistill.export.trained_student import write_trained_student
from lcmdistill.objectives.base import Objective
from lcmdistill.objectives.common import noise_level_fraction
from lcmdistill.sampling.prompts import STEPS
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.best import best_checkpoint_advice, keep_best
from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.training.distributed import Accelerator, StopSignal, gather, make_accelerator, min_free_memory
from lcmdistill.training.memory.plan import MemoryCheck, log_plan, plan_memory
from lcmdistill.training.optimizer import learning_rate_at
from lcmdistill.training.preflight import validate_for_teacher
from lcmdistill.training.run_settings import check_run, finished, mark_finished, open_run, resolve_run_defaults
from lcmdistill.training.setup import NOISE_BINS, Run, build, prepare_data, progress_callback
from lcmdistill.training.signals import Stop, catch_signals
from lcmdistill.training.validation import Validator
from lcmdistill.utils.checkpoint import load_checkpoint
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.logging import progress
from lcmdistill.utils.metrics_log import Metrics, check_tracker
from lcmdistill.utils.run_dir import checkpoints

logger = logging.getLogger(__name__)


def train_steps(run: Run, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
    """The loop: accumulate, backward, clip, step, update the target, yield (mean loss, gradient norm), on the device."""
    optim = run.config.optim
    accelerator, device = run.accelerator, run.accelerator.device
    parameters = list(run.student.trainable.values())
    micro_batches = _asked(run, objective, _read(run))

    def update() -> Tensor:
        # An infinite limit clips nothing and still measures.
        norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.student.follow(objective.mu(run.step))
        return torch.as_tensor(norm)

    while run.step < optim.max_train_steps:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, optim)
        total = torch.zeros((), device=device)
        for micro in range(optim.gradient_accumulation_steps):
            rng, batch, models = next(micro_batches)
            last = micro == optim.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(run.online):
                each = _backward(run, objective, models, batch, rng)
            total += each.mean() / optim.gradient_accumulation_steps
            t, _ = objective.pair(run.models.schedule, rng)
            run.by_noise += _binned(each, noise_level_fraction(run.models.schedule, t))
        norm = _of_student(run, update)
        run.step += 1
        yield total, norm


def _backward(run: Run, objective: Objective, models: Networks, batch: Batch, rng: Rng) -> Tensor:
    """Add the gradients of a micro-batch's share of the step's mean loss; returns each sample's loss, (B,)."""

    def whole() -> Tensor:
        models.seed_dropout(rng)
        each = objective.loss(models, batch, rng)
        run.accelerator.backward(each.mean() / run.config.optim.gradient_accumulation_steps)
        return each.detach()

    return _of_student(run, whole)


def _of_student(run: Run, work: Callable[[], Tensor]) -> Tensor:
    """Do work of the student's, where the rest of its work is done."""
    return work() if run.side_by_side is None else run.side_by_side.student(work)


def _micro_batches(run: Run) -> Iterator[tuple[Rng, list[int]]]:
    """This process's micro-batches from the run's step to its end: their draws, and which samples they take."""
    optim, data, seed = run.config.optim, run.config.data, run.config.run.seed
    size = len(run.dataset)
    order = SampleOrder(size, seed, run.global_batch, run.dataset.shapes)
    for step in range(run.step, optim.max_train_steps):
        for micro in range(optim.gradient_accumulation_steps):
            first = (micro * run.accelerator.num_processes + run.accelerator.process_index) * optim.batch_size
            places = range(first, first + optim.batch_size)
            indices = order.indices(step, places)
            kept = None
            if data.teacher_cache_samples:
                kept = list(
                    zip(
                        indices,
                        cached_noise_index(step, places, run.global_batch, size, data.teacher_cache_samples),
                        strict=True,
                    )
                )
            yield Rng(seed, step, places, run.accelerator.device, kept), indices


def _read(run: Run) -> Iterator[tuple[Rng, Batch]]:
    """The micro-batches, the next one read while one is computed; counts the time that is waited for them."""
    ahead, behind = itertools.tee(_micro_batches(run))
    reads = read_ahead(run.dataset, (indices for _, indices in ahead))
    for rng, _ in behind:
        began = time.monotonic()
        read = next(reads)
        run.waited += time.monotonic() - began
        yield rng, batch_of(read, rng, run.models.null, run.config.data.caption_drop)


def _asked(
    run: Run, objective: Objective, micro_batches: Iterator[tuple[Rng, Batch]]
) -> Iterator[tuple[Rng, Batch, Networks]]:
    """Each with the networks that its loss is to ask."""
    answered = ((rng, batch, _answered(run, rng)) for rng, batch in micro_batches)
    return run.side_by_side.asked(objective, answered) if run.side_by_side is not None else answered


def _answered(run: Run, rng: Rng) -> Networks:
    """The run's models, with a teacher that was asked beforehand, if it was."""
    if run.answers is None:
        return run.models
    assert rng.kept is not None
    raw = run.answers.teacher(rng.kept, run.accelerator.device)
    return replace(run.models, teacher=x0_eps_network(raw, run.models.schedule, run.teacher.prediction_type))


def _binned(losses: Tensor, noisiness: Tensor) -> Tensor:
    """Sums of losses, and how many, in each of NOISE_BINS, (2, NOISE_BINS). losses, noisiness: (B,)."""
    bins = torch.arange(NOISE_BINS, device=losses.device)
    member = (noisiness * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)[:, None] == bins
    return torch.stack([(member * losses[:, None]).sum(0), member.sum(0).to(losses.dtype)])


SLOW_DATA = 0.05
"the share of its time that a run may wait for data in silence"


@dataclass(frozen=True)
class RunDocuments:
    """What the layers above write about a run: each is called with (config, run folder, teacher).

    card: the model card's text, for the pipeline folder; write: the run's own documents, once its product is there.
    """

    card: Callable[[RunConfig, Path, Teacher], str] = lambda config, folder, teacher: ""
    write: Callable[[RunConfig, Path, Teacher], None] = lambda config, folder, teacher: None


def distill(config: RunConfig, documents: RunDocuments) -> Path:
    """Run, or resume, a distillation to its end; returns the run's folder.

    Raises UsageError for what the user can mend, RunError for what went wrong on the way, Interrupted after Ctrl-C.
    """
    with catch_signals() as stop:
        accelerator = make_accelerator(config)
        try:
            return _distill(config, documents, accelerator, stop)
        finally:
            accelerator.end_training()


def _distill(asked: RunConfig, documents: RunDocuments, accelerator: Accelerator, stop: Stop) -> Path:
    config = asked
    loud = accelerator.is_main_process
    world = accelerator.num_processes
    if finished(config):
        check_run(config)
        if loud:
            logger.info(
                f"{config.run.output} has all of the {config.optim.max_train_steps} steps asked for: nothing is left to do"
            )
        return Path(config.run.output or "")
    if loud:
        check_run(config)
        check_tracker(config.run.report_to)
    folder = Path(config.run.output or "")
    done = checkpoints(folder / "checkpoints")
    if loud:
        logger.info(f"teacher {config.teacher.model}, objective {config.objective_name}, output {folder}")
    teacher = load_teacher(**asdict(config.teacher))
    config = resolve_run_defaults(config, world, teacher)
    if loud:
        check_run(config)
    validate_for_teacher(config, teacher)
    plan = plan_memory(config, teacher, accelerator.device, free=min_free_memory(accelerator), world=world, loud=loud)
    if plan is not None:
        config = plan.config
        if loud:
            log_plan(plan)
    stop.check("stopped before anything was begun; the same command begins anew, or goes on where it was")
    accelerator.wait_for_everyone()
    if loud:
        # Not before: what is refused leaves no folder behind.
        data, seed = config.data, config.run.seed
        open_run(config, {spec: cache_folder(spec, data, teacher, seed).name for spec in data.sources}, asked)
    teacher.to(accelerator.device)
    folders = prepare_data(config, teacher, accelerator, stop)
    dataset = LatentDataset(folders, [config.data.max_samples] * len(folders))
    if loud:
        for spec, report in zip(config.data.sources, dataset.reports, strict=True):
            logger.info(
                f"data {spec}: {report}{unused_samples(spec, config.data, report, takes_prompts=not teacher.in_pixels)}"
            )
    if not len(dataset):
        raise UsageError("the data hold nothing usable; run with --dry-run to see why")
    validation = Validator(config, teacher, folder) if loud else None
    if validation is not None and config.run.validate_every:
        at_teacher = "stopped while the teacher drew its own validation pictures; the same command goes on"
        dtype = compute_dtype(config.run.precision, accelerator.device)
        validation.generate_references(dtype, lambda images: stop.check(at_teacher))
    draws = config.data.teacher_cache_samples
    with progress("asking the teacher", len(dataset) * draws, enabled=loud and draws > 0) as bar:
        run = build(
            config, folder, accelerator, teacher, dataset, progress_callback("asking the teacher", bar, stop, loud=loud)
        )
    run.needed = plan and plan.needed
    if loud:
        used = [*dataset.folders, *([run.answers.folder] if run.answers else [])]
        evict_lru(cache_root(config.data), config.data.cache_limit * 1e9, used)
    if done:
        _restore(run, done[-1])
        if loud:
            logger.info(f"resuming from {done[-1].name}")
    if loud and run.compiled:
        logger.info("the networks are compiled at the first step, which takes minutes; --compile off begins at once")
    metrics = Metrics(folder, config.run.report_to, flatten(config), run.step) if loud else None
    try:
        _follow(run, validation, metrics, stop)
    finally:
        run.writer.wait()
        if metrics is not None:
            metrics.close()
    if loud and validation is not None:
        what = write_trained_student(config, folder, teacher, run.student, documents.card(config, folder, teacher))
        documents.write(config, folder, teacher)
        mark_finished(folder, run.step)
        if better := best_checkpoint_advice(folder, config.run.best_metric):
            logger.info(better)
        logger.info(f"done: {what} draws in 1 to 8 steps; try: lcmdistill sample {quote(str(folder))} --steps 4")
    accelerator.wait_for_everyone()
    return folder


def _follow(run: Run, validation: Validator | None, metrics: Metrics | None, stop: Stop) -> None:
    """Go through the steps; log, check, validate and save at their times."""
    config, accelerator = run.config.run, run.accelerator
    total = run.config.optim.max_train_steps
    with progress("distilling", total, enabled=validation is not None) as bar:
        bar.update(run.step)
        if validation is not None and _due(run.step, config.validate_every, total) and validation.is_missing(run.step):
            _validate(run, validation, metrics)
        count, since = 0, time.monotonic()
        agreement = StopSignal(stop, accelerator)
        memory = MemoryCheck(run.needed if validation is not None else None, accelerator.device)
        for loss, norm in train_steps(run, run.config.objective):
            memory.after_step()
            run.unlogged.append(loss)
            count += 1
            bar.update(run.step)
            signalled = agreement.signal()
            at_log = run.step % config.log_every == 0 or run.step == total
            if at_log:
                mean = float(gather(torch.stack(run.unlogged).mean(), accelerator).mean())
                _check_finite(mean, norm, run)
                sums, counts = gather(run.by_noise, accelerator).sum(0).tolist()
                seconds = time.monotonic() - since
                speed, waiting = count * run.global_batch / seconds, run.waited / seconds
                if metrics is not None:
                    rate = learning_rate_at(run.step - 1, run.config.optim)
                    values = {"loss": mean, "grad_norm": float(norm), "learning_rate": rate, "samples_per_s": speed}
                    values["data_wait"] = waiting
                    by_noise = [a / n if n else None for a, n in zip(sums, counts, strict=True)]
                    metrics.log(run.step, values, loss_by_noise=by_noise)
                    left = timedelta(seconds=round((total - run.step) * run.global_batch / speed))
                    line = f"loss {mean:.5f}  {speed:.1f} samples/s"
                    if waiting > SLOW_DATA:
                        line += f"  {waiting:.0%} of the time waiting for data"
                    bar.update(run.step, line)
                    if not bar.visible:
                        logger.info(f"step {run.step}/{total}  {line}  left {left}")
                run.unlogged.clear()
                run.by_noise.zero_()
                count, since, run.waited = 0, time.monotonic(), 0.0
            began = time.monotonic()
            if run.step % config.checkpoint_every == 0 or run.step == total or signalled:
                _save(run)
            if signalled:
                run.writer.wait()
                stop.signal = signalled
                stop.check(f"stopped at step {run.step}, which is saved; the same command resumes")
            if validation is not None and _due(run.step, config.validate_every, total):
                _validate(run, validation, metrics)
            since += time.monotonic() - began


def _due(step: int, every: int, total: int) -> bool:
    return every > 0 and (step % every == 0 or step == total)


def _validate(run: Run, validation: Validator, metrics: Metrics | None) -> None:
    numbers = validation.draw(run.step, run.student.for_sampling(), metrics)
    told = f"step {run.step} drawn: {validation.picture(run.step)}"
    if numbers:
        distances = (f"{numbers[f'val/rmse_{n}']:g} at {n}" for n in STEPS if f"val/rmse_{n}" in numbers)
        told += f"  RMSE to the teacher {', '.join(distances)} steps"
    logger.info(told)
    if run.config.run.best_metric != "none":
        weights = run.student.averaged or run.student.trainable
        if worry := keep_best(run.folder, run.config.run.best_metric, run.step, weights):
            logger.info(worry)


def _check_finite(loss: float, norm: Tensor, run: Run) -> None:
    # Under fp16 an infinite norm is the loss scaler's ordinary way of finding its scale.
    if math.isfinite(loss) and (run.accelerator.scaler is not None or bool(norm.isfinite())):
        return
    run.writer.wait()
    kept = checkpoints(run.folder / "checkpoints")
    last = f"the last good checkpoint, {kept[-1].name}, is kept" if kept else "no checkpoint had been written yet"
    raise RunError(
        f"the loss is no longer finite (step {run.step}: loss {loss:g}, gradient norm {float(norm):g}); {last}; "
        "lower --learning-rate, or use --precision fp32 or bf16"
    )


def _save(run: Run) -> None:
    run.accelerator.wait_for_everyone()
    by_noise = gather(run.by_noise, run.accelerator).sum(0).tolist()
    if run.accelerator.is_main_process:
        if not all(bool(value.isfinite().all()) for value in run.student.trainable.values()):
            _check_finite(math.nan, torch.tensor(math.nan), run)
        scaler = run.accelerator.scaler
        groups = {
            "student": run.student.trainable,
            "target": run.student.averaged,
            "optimizer": optimizer_tensors(run.optimizer),
        }
        state = {
            "global_batch": run.global_batch,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "unlogged": [loss.cpu() for loss in run.unlogged],
            "by_noise": by_noise,
        }
        run.writer.save(run.step, groups, state)
    run.accelerator.wait_for_everyone()


def _restore(run: Run, path: Path) -> None:
    groups, state = load_checkpoint(path)
    if state["global_batch"] != run.global_batch:
        raise UsageError(
            f"{path.parent.parent} was trained with {state['global_batch']} samples a step and this command takes "
            f"{run.global_batch} (batch size x accumulate x processes); make them equal to resume"
        )
    _copy_into(run.student.trainable, groups["student"])
    _copy_into(run.student.averaged, groups["target"])
    run.student.refresh()
    restore_optimizer(run.optimizer, groups["optimizer"])
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.unlogged = [loss.to(run.accelerator.device) for loss in state["unlogged"]]
    if "by_noise" in state and run.accelerator.is_main_process:  # it is the sum of all processes'
        run.by_noise.copy_(torch.tensor(state["by_noise"]))


@torch.no_grad()
def _copy_into(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if parameters.keys() != saved.keys():
        raise RunError("the checkpoint's parameters are not this student's; it was written by another version")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
